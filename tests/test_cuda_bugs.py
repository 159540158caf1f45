"""What the emulated device and the sanitizers must find: planted bugs in kernels made for that, and changes of the CUDA
backend's own source."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from emulated import CUDA, PLUGIN, ROOT, VARIANTS, Builds, backend_sources, bench, compile_file, output, run

#: Kernels of tests/cuda/bugs.cu -> what the plain emulator says; None: nothing, the kernel is right or only a
#: sanitizer can tell.
SAID = {
    "divergent_barrier": "16 of 32 threads have ended and don't reach __syncthreads()",
    "two_barriers": r"threads wait at __syncthreads\(\) in line \d+ and in line \d+",
    "barrier_after_exit": "1 of 32 threads have ended",
    "shuffle_without_all": "the mask names lane 16, which has ended or does not exist",
    "shuffle_not_in_mask": "a shuffle reads lane 17, which its mask 0000ffff does not name",
    "shuffle_from_outside": "a shuffle reads lane 16, which its mask 0000ffff does not name",
    "shuffle_beyond_block": "the mask names lane 30",
    "shared_unwritten": "no error; 1 NaN",
    "shared_too_large": "52000 bytes of shared memory, of which 49152 are allowed",
    "dynamic_not_asked_for": "invalid argument",
    "no_blocks": "invalid configuration argument",
    "too_many_threads": "invalid configuration argument",
    "touch_device_memory": "",
    "beyond_global": "",
}
RIGHT = ("shuffle_right", "dynamic_right", "dynamic_asked_for", "ordered_shared", "atomic_blocks", "ordered_warp")
BEYOND = ("beyond_global", "before_global", "beyond_shared", "beyond_dynamic", "touch_device_memory")
RACES = ("race_shared", "race_shared_again", "race_global", "race_blocks", "race_warp")


def test_planted_bugs(builds: Builds) -> None:
    program = builds.get("plain") / "bugs"
    for bug, said in SAID.items():
        done = run(program, bug)
        assert done.returncode != 0 and re.search(said.replace("()", r"\(\)"), output(done)), f"{bug}: {output(done)}"
    for bug in RIGHT:
        done = run(program, bug)
        assert (done.returncode, done.stdout) == (0, "no error; 0 NaN\n"), f"{bug}: {output(done)}"


@pytest.mark.parametrize("variant, bugs, said", [
    ("address", BEYOND, "ERROR: AddressSanitizer: (heap-buffer-overflow|use-after-poison)"),
    ("thread", RACES, "WARNING: ThreadSanitizer: data race"),
])
def test_planted_bugs_under_sanitizers(builds: Builds, variant: str, bugs: tuple[str, ...], said: str) -> None:
    program = builds.get(variant) / "bugs"
    for bug in bugs:
        done = run(program, bug)
        assert done.returncode != 0 and re.search(said, done.stderr), f"{bug}: {output(done)}"
    for bug in RIGHT:
        done = run(program, bug)
        assert (done.returncode, done.stdout) == (0, "no error; 0 NaN\n"), f"{bug}: {output(done)}"


#: Changes of the backend's own source: file, text, what it becomes, the sources that see it, variant, cases, and what
#: the run then says.
MUTANTS = {
    "sum_without_barrier": ("kernel.cuh", "    __syncthreads();\n    float total", "    float total", ["linear.cu"],
                            "plain", "bias_backward rows", "NaN"),
    "next_sum_without_barrier": ("kernel.cuh", "    __syncthreads(); /* part is the next sum's */\n", "",
                                 ["layer_norm.cu"], "thread", "layer_norm_backward rows=65 ",
                                 "data race .* in gd_column_total"),
    "exit_before_barrier": ("linear.cu", "    float sum = 0;\n",
                            "    float sum = 0;\n    if (column >= width)\n        return;\n", ["linear.cu"], "plain",
                            "bias_backward rows", "threads have ended"),
    "half_a_warp": ("kernel.cuh", "distance = GD_WARP / 2", "distance = GD_WARP / 4", ["layer_norm.cu"], "plain",
                    "layer_norm rows", "expected .* within"),
    "lane_outside": ("kernel.cuh", "__shfl_xor_sync(0xffffffffu", "__shfl_xor_sync(0x7fffffffu", ["layer_norm.cu"],
                     "plain", "layer_norm rows", "which its mask 7fffffff does not name|not in its mask"),
    "a_row_too_many": ("layer_norm.cu", "if (row >= n.rows) /*", "if (row > n.rows) /*", ["layer_norm.cu"], "address",
                       "layer_norm rows=5 ", "heap-buffer-overflow .* in layer_norm_rows"),
    "a_column_too_many": ("kernel.cuh", "column < width;", "column <= width;", ["elementwise.cu"], "address",
                          "axpby rows=1 ", "heap-buffer-overflow .* in axpby"),
    "short_leading_dimension": ("gemm.c", ".b_row = 1, .b_col = w->in,", ".b_row = 1, .b_col = w->in - 1,", ["gemm.c"],
                                "plain", "linear rows=23 ", "expected .* within|cublasGemmEx"),
    "windows_in_one_piece": ("gemm.c", "gd_smaller(x->length, larger(x->ld, 1))", "x->length", ["gemm.c"], "plain",
                             "gemm m=64 n=10 k=50 ", "within|cublasGemmEx"),
    "another_device": ("backend_cuda.c", "cudaSetDevice(cuda->device), \"cudaSetDevice\"",
                       "cudaSetDevice(0), \"cudaSetDevice\"", ["backend_cuda.c"], "plain", "axpby rows=1 ", "invalid"),
    "values_over_keys": ("attention.cu", "            __syncthreads(); /* K was read */\n", "", ["attention.cu"],
                         "thread", "attention heads=3 head_dim=15 ", "data race .* gd_(stage|add_products)"),
    "padding_as_keys": ("attention.cu", "key + 4 * lane + i < head.keys", "key + 4 * lane + i < head.rows",
                        ["attention.cu"], "plain", "attention heads=2 head_dim=16 ", "expected .* within"),
    "a_bias_too_many": ("attention.cuh", "at + x < width", "at + x <= width", ["attention.cu"], "address",
                        "attention heads=2 head_dim=3 rows=5 ", "heap-buffer-overflow .* in gd_load_bias"),
    "one_mask_for_all_heads": ("attention.cuh", "utterance * call.a.heads + number", "utterance * call.a.heads",
                               ["attention_backward.cu"], "plain", "attention_backward heads=2 head_dim=16 ",
                               "expected .* within"),
    "a_diagonal_missed": ("attention_backward.cu", "for (int x = at % 4; x < 7; x += 4)",
                          "for (int x = at % 4; x < 4; x += 4)", ["attention_backward.cu"], "plain",
                          "attention_backward heads=3 head_dim=15 ", "expected .* within"),
    "items_of_other_slabs": ("gate.cu", "slab * SLAB_ROWS * g.heads", "slab * SLAB_ROWS", ["gate.cu"], "plain",
                                 "gate_backward rows=70 ", "expected .* within"),
    "windows_overwritten": ("pos_conv.cu", "            __syncthreads();\n        }\n#pragma", "        }\n#pragma",
                            ["pos_conv.cu"], "plain", "pos_conv batch=3 longest=33 ", "expected .* within"),
    "a_frame_too_many": ("pos_conv.cu", "start + r < valid ?", "start + r <= valid ?", ["pos_conv.cu"], "address",
                         "pos_conv_backward_weight batch=3 longest=17 ",
                         "heap-buffer-overflow .* in pos_conv_weight_gradient"),
    "tree_without_barrier": ("weights.cu", "        __syncthreads();\n        if", "        if", ["weights.cu"],
                             "plain", "weight_norm out=5 ", "expected .* within|NaN|other bits"),
    "more_blocks_than_sums": ("extractor.cu", "blocks < MOST_BLOCKS ? blocks : (int64_t)MOST_BLOCKS", "blocks",
                              ["extractor.cu"], "plain", "normalize samples=1200000 ", "expected .* within"),
    "rounded_by_cutting": ("elementwise.cu", "gd_bfloat16_from_float(x[r * ldx + c])",
                           "(uint16_t)(gd_bits_from_float(x[r * ldx + c]) >> 16)", ["elementwise.cu"], "plain",
                           "gemm_reduced m=24 ", "expected .* within"),
    "packed_by_cutting": ("kernel.cuh", "[at] = gd_bfloat16_from_float(x)",
                          "[at] = (uint16_t)(gd_bits_from_float(x) >> 16)", ["linear.cu"], "plain",
                          "linear_reduced rows=24 ", "expected .* within"),
    "a_row_not_rounded": ("gemm.c", "(rows - 1) * w->stride + w->taps, w->in,", "rows * w->stride, w->in,", ["gemm.c"],
                          "plain", "linear_reduced rows=23 ", "expected .* within"),
    "one_half_for_both": ("gemm.c", "g->precision, 1, b.lines", "g->precision, 0, b.lines", ["gemm.c"], "plain",
                          "gemm_reduced m=24 ", "expected .* within"),
    "keys_not_rounded": ("attention.cuh", "gd_rounded(call.a.precision, value)", "value", ["attention.cu"], "plain",
                         "attention_reduced heads=2 head_dim=33 ", "expected .* within"),
    "frames_not_rounded": ("pos_conv.cu", "gd_rounded(p.precision, columns + c < n ?", "(columns + c < n ?",
                           ["pos_conv.cu"], "plain", "pos_conv_backward_weight batch=3 longest=33 ",
                           "expected .* within"),
    "rows_left_as_they_were": ("conv_backward.c", "(size_t)c->dx_rows, cuda->stream", "(size_t)c->rows, cuda->stream",
                               ["conv_backward.c"], "plain", "conv_backward rows=7 ", "NaN"),
}


def mutate(builds: Builds, folder: Path, variant: str, file: str, text: str, becomes: str, sources: list[str]) -> Path:
    """A package whose plug-in has `becomes` for `text` in this file of cuda/."""
    package = builds.get(variant)
    shutil.copytree(CUDA, folder / "cuda", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "csrc").symlink_to(ROOT / "csrc")
    original = (CUDA / file).read_text(encoding="utf-8")
    assert original.count(text) == 1, f"{file} has changed"
    (folder / "cuda" / file).write_text(original.replace(text, becomes), encoding="utf-8")
    objects = {source.name: builds.folder / variant / "objects" / f"{source.name}.o" for source in backend_sources()}
    for name in sources:
        objects[name] = compile_file(folder / "cuda" / name, folder / f"{name}.o", *VARIANTS[variant][0])
    shutil.copytree(package.parent / "nvidia", folder / "site" / "nvidia")
    mutated = folder / "site" / "gendistiller_ext"
    mutated.mkdir()
    builds.link_plugin(variant, list(objects.values()), mutated / PLUGIN)
    shutil.copy(package / "ops", mutated)
    return mutated


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants(builds: Builds, tmp_path: Path, mutant: str) -> None:
    file, text, becomes, sources, variant, cases, said = MUTANTS[mutant]
    assert bench(builds.get(variant), "--exact", cases).returncode == 0
    done = bench(mutate(builds, tmp_path, variant, file, text, becomes, sources), "--exact", cases)
    assert done.returncode != 0 and re.search(said, output(done)), output(done)[-4000:]


def test_little_scratch(builds: Builds, tmp_path: Path) -> None:
    """Where it holds what operations need at least, they go through the batch in parts."""
    little = mutate(builds, tmp_path, "plain", "ops.h", "1 << 20, GD_CUDA_FACTOR_ROWS = 1 << 12",
                    "1 << 10, GD_CUDA_FACTOR_ROWS = 1 << 2", ["backend_cuda.c", "gemm.c"])
    cases = ("gate_backward rows=70 ", "attention_backward heads=2 head_dim=17 ",
             "attention_backward heads=2 head_dim=5 ", "linear_reduced rows=193 out=40 taps=2 in=32 stride=1 flags=69",
             "linear_reduced rows=11 out=47 taps=1 in=63 stride=1 flags=79", "gemm_reduced m=13 n=33 ",
             "conv_backward rows=5 out=48 taps=3 in=33 stride=2 beyond=1 flags=10")
    launches = []
    for package in (builds.get("plain"), little):
        done = bench(package, *cases, report=tmp_path / "report")
        assert done.returncode == 0 and done.stdout.endswith("7 passed, 0 failed\n"), output(done)
        report = (tmp_path / "report").read_text()
        launches.append([int(re.search(rf"^{kernel}\b.* forward (\d+)", report, re.MULTILINE)[1])
                         for kernel in ("gate_backward_items", "attention_deltas", ".*round_rows")])
    assert launches == [[1, 2, 11], [3, 4, 130]]
