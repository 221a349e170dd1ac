"""Puts into the wheel what is no code and lies elsewhere in a checkout: the files that `resmaster_flows.home` finds.

Everything else about the package is in pyproject.toml.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGE = "resmaster_flows"
FILES = ("deployments/*.yaml", "deployments/datasets/*.yaml", "infra/*/job-template.yaml")


class BuildWithFiles(build_py):
    """setuptools' copying of the packages, and of `FILES` into `PACKAGE` under the same names."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout itself is used
            return
        for path in (path for pattern in FILES for path in sorted(Path().glob(pattern))):
            copy = Path(self.build_lib, PACKAGE, path)
            self.mkpath(str(copy.parent))
            self.copy_file(str(path), str(copy))


setup(cmdclass={"build_py": BuildWithFiles})
