"""The import hook behind `gendistiller_s3prl.pth`, which runs at every start of the interpreter: it imports
nothing but this file, and nothing more happens until the program imports s3prl.

Then, after the import of

    s3prl                        torchaudio gets what S3PRL misses in it (`compat`), now or when imported
    s3prl.hub                    gendistiller, gendistiller_local and gendistiller_url are added to it
    pretrain                     in S3PRL's run_pretrain.py: `-u gendistiller` (`pretraining`)
    torchaudio._extension.utils  in a program that is S3PRL's: a library of another torch build counts as none

Without catalyst, of which S3PRL's keyword spotting imports one class, that class is supplied.
"""

import sys


def _is_s3prl() -> bool:
    """Whether the program is S3PRL's: it imported s3prl, or it is a file of the package such as
    run_downstream.py, which imports torchaudio first."""
    if "s3prl" in sys.modules:
        return True
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    if not path:
        return False
    import os

    folder = os.path.dirname(os.path.abspath(path))
    return all(os.path.isfile(os.path.join(folder, name)) for name in ("run_downstream.py", "hub.py"))


def _after_s3prl(module) -> None:
    from . import compat

    compat.allow_checkpoints()
    for name in ("torchaudio._extension.utils", "torchaudio"):
        if name in sys.modules:
            STEPS[name](sys.modules[name])


def _after_hub(module) -> None:
    from . import hubconf

    for name in hubconf.UPSTREAMS:
        setattr(module, name, getattr(hubconf, name))


def _after_pretrain(module) -> None:
    if _is_s3prl():
        from . import pretraining

        pretraining.add_to(module)


def _after_torchaudio(module) -> None:
    if "s3prl" in sys.modules:
        from . import compat

        compat.complete_torchaudio(module)


def _after_extension(module) -> None:
    if _is_s3prl():
        from . import compat

        compat.tolerate_foreign_library(module)


STEPS = {
    "s3prl": _after_s3prl,
    "s3prl.hub": _after_hub,
    "pretrain": _after_pretrain,
    "torchaudio": _after_torchaudio,
    "torchaudio._extension.utils": _after_extension,
}


def _run(step, module) -> None:
    try:
        step(module)
    except Exception as error:  # the user's program must not fail for our sake
        reason = f"{type(error).__name__}: {error}"
        sys.stderr.write(f"gendistiller: {module.__name__} is left as it is: {reason}\n")


class Finder:
    """First in sys.meta_path: lets the others find, and has a step run after the module's own code."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in STEPS:
            spec = Finder.elsewhere(name, path, target)
            run = getattr(getattr(spec, "loader", None), "exec_module", None)
            if run is None:
                return spec

            def exec_module(module):
                run(module)
                _run(STEPS[name], module)

            try:
                spec.loader.exec_module = exec_module
            except AttributeError:
                pass
            return spec
        if name.partition(".")[0] == "catalyst" and "s3prl.downstream.speech_commands" in sys.modules:
            try:
                from . import catalyst_sampler

                return Finder.elsewhere(name, path, target) or catalyst_sampler.find_spec(name)
            except Exception:
                pass
        return None

    @staticmethod
    def elsewhere(name, path, target):
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is not Finder and find is not None:
                spec = find(name, path, target)
                if spec is not None:
                    return spec
        return None


def install() -> None:
    """Put the finder in place, once; run the steps of what is imported already."""
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)
    for name in ("s3prl", "s3prl.hub"):
        if name in sys.modules:
            _run(STEPS[name], sys.modules[name])
