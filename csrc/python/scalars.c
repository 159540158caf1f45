/* scalars.c - numbers and strings as C values, or an exception that names the argument. */
#include <limits.h>
#include <math.h>
#include <stdio.h>

#include "binding.h"

static int wrong_type(const char *name, const char *expected, PyObject *value)
{
    PyErr_Format(PyExc_TypeError, "%s: expected %s, got %.100s", name, expected,
                 Py_TYPE(value)->tp_name);
    return 0;
}

/* A Python int of what has __index__; True is no number here. NULL with TypeError. */
static PyObject *as_integer(PyObject *value, const char *name, const char *expected)
{
    /* All arrays have __index__, which most of them refuse. */
    PyObject *integer = PyIndex_Check(value) && !PyBool_Check(value) ? PyNumber_Index(value) : NULL;
    if (!integer && (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_TypeError)))
        wrong_type(name, expected, value);
    return integer;
}

static void out_of_range(const char *name, const char *low, const char *high, PyObject *integer)
{
    PyObject *text = PyObject_Str(
        integer); /* fails where Python limits the digits of huge numbers */
    if (!text)
        PyErr_Clear();
    if (high)
        PyErr_Format(PyExc_ValueError, "%s: expected %s to %s, got %.40S", name, low, high,
                     text ? text : Py_None);
    else
        PyErr_Format(PyExc_ValueError, "%s: expected %s or more, got %.40S", name, low,
                     text ? text : Py_None);
    Py_XDECREF(text);
}

int take_integer(PyObject *value, const char *name, int64_t low, int64_t high, int64_t *result)
{
    PyObject *integer = as_integer(value, name, "an integer");
    if (!integer)
        return 0;
    int overflow = 0;
    long long number = PyLong_AsLongLongAndOverflow(integer, &overflow);
    int good = !overflow && number >= low && number <= high;
    if (good) {
        *result = number;
    } else {
        char bounds[2][24];
        snprintf(bounds[0], sizeof bounds[0], "%lld", (long long)low);
        snprintf(bounds[1], sizeof bounds[1], "%lld", (long long)high);
        out_of_range(name, bounds[0], high == INT64_MAX ? NULL : bounds[1], integer);
    }
    Py_DECREF(integer);
    return good;
}

int take_count(PyObject *value, const char *name, int *result)
{
    int64_t number = 0;
    if (value != Py_None && !take_integer(value, name, 1, INT_MAX, &number))
        return 0;
    *result = (int)number;
    return 1;
}

int take_unsigned(PyObject *value, const char *name, uint64_t *result)
{
    PyObject *integer = as_integer(value, name, "an integer");
    if (!integer)
        return 0;
    unsigned long long number = PyLong_AsUnsignedLongLong(integer);
    int good = !(number == (unsigned long long)-1 && PyErr_Occurred());
    if (good) {
        *result = number;
    } else {
        PyErr_Clear();
        out_of_range(name, "0", "18446744073709551615", integer);
    }
    Py_DECREF(integer);
    return good;
}

int take_number(PyObject *value, const char *name, double low, double high, int open,
                double *result)
{
    double number;
    if (PyFloat_Check(value) || PyArray_IsScalar(value, Floating)) {
        number = PyFloat_AsDouble(value);
    } else {
        PyObject *integer = as_integer(value, name, "a number");
        if (!integer)
            return 0;
        number = PyLong_AsDouble(integer);
        Py_DECREF(integer);
    }
    if (number == -1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError))
            return 0;
        PyErr_Clear();
        number = INFINITY;
    }
    if (isfinite(number) && number >= low && (open ? number < high : number <= high)) {
        *result = number;
        return 1;
    }
    char text[160];
    if (isinf(high))
        snprintf(text, sizeof text, "expected a finite number of %g or more, got %g", low, number);
    else
        snprintf(text, sizeof text, "expected %g to %s%g, got %g", low, open ? "below " : "", high,
                 number);
    PyErr_Format(PyExc_ValueError, "%s: %s", name, text);
    return 0;
}

int take_choice(PyObject *value, const char *name, const char *const *choices, int *result)
{
    if (!PyUnicode_Check(value))
        return wrong_type(name, "a string", value);
    for (int i = 0; choices[i]; i++) {
        if (PyUnicode_CompareWithASCIIString(value, choices[i]) == 0) {
            *result = i;
            return 1;
        }
    }
    PyObject *list = PyUnicode_FromFormat("'%s'", choices[0]);
    for (int i = 1; list && choices[i]; i++)
        Py_SETREF(list, PyUnicode_FromFormat("%U%s'%s'", list, choices[i + 1] ? ", " : " or ",
                                             choices[i]));
    if (list)
        PyErr_Format(PyExc_ValueError, "%s: expected %U, got %.100R", name, list, value);
    Py_XDECREF(list);
    return 0;
}

int take_precision(PyObject *value, enum gd_precision *precision)
{
    static const char *const precisions[] = {"float32", "bfloat16", "int8", NULL};
    int index = 0;
    if (value == Py_None)
        return 1;
    if (!take_choice(value, "precision", precisions, &index))
        return 0;
    *precision = (enum gd_precision)index;
    return 1;
}

int take_dropout_seed(PyObject *value, gd_dropout_seed *seed, int *given)
{
    static const char expected[] = "None or (seed, step, first_utterance)";
    *given = value != Py_None;
    if (!*given)
        return 1;
    if (!PyTuple_Check(value) && !PyList_Check(value))
        return wrong_type("dropout_seed", expected, value);
    PyObject *items = PySequence_Tuple(value);
    if (!items)
        return 0;
    int good = 0;
    if (PyTuple_GET_SIZE(items) != 3)
        PyErr_Format(PyExc_ValueError, "dropout_seed: expected %s, got %zd items", expected,
                     PyTuple_GET_SIZE(items));
    else
        good = take_unsigned(PyTuple_GET_ITEM(items, 0), "dropout_seed[0]", &seed->seed) &&
               take_unsigned(PyTuple_GET_ITEM(items, 1), "dropout_seed[1]", &seed->step) &&
               take_integer(PyTuple_GET_ITEM(items, 2), "dropout_seed[2]", 0, INT64_MAX,
                            &seed->first_utterance);
    Py_DECREF(items);
    return good;
}
