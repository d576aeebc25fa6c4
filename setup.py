"""Metadata, entry points, and the files that make nnU-Net find the trainers."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.build import build

ROOT = Path(__file__).parent
FIGURES = ["scikit-learn"]  # PCA, t-SNE and silhouettes of SHTA's tokens
COMMANDS = (
    "preprocess",
    "warp",
    "split",
    "dataset",
    "trainers",
    "export",
    "demo",
    "evaluate",
    "pseudolabel",
    "benchmark",
    "figures",
)
BENCHMARK = ['snakemake>=9; python_version >= "3.11"']  # which asks for it


class build_startup(Command):  # noqa: N801 - as setuptools names its commands
    """Puts the files of ``startup/`` at the root of site-packages, in plain and in editable installs.

    Python reads ``.pth`` and ``.start`` files there and nowhere else. As part of the wheel they are in its list of
    files, so uninstalling removes them.
    """

    description = "install the files that make nnU-Net find the trainers"
    user_options = []
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        # Nothing in build_lib gets into an editable wheel; what lies in its unpacked folder does.
        target = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(target)
        for file in self.get_source_files():
            self.copy_file(file, target)

    def get_source_files(self):
        return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "startup").glob("*.*"))

    def get_outputs(self):
        return [str(Path(self.build_lib, Path(file).name)) for file in self.get_source_files()]

    def get_output_mapping(self):
        return {}


class build_all(build):  # noqa: N801
    sub_commands = [*build.sub_commands, ("build_startup", None)]


setup(
    name="nnunet-ssl",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "nnunet_ssl/__init__.py").read_text(encoding="utf-8"))[1],
    description="Semi-supervised learning for nnU-Net v2: train with images that have no labels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The nnunet_ssl maintainers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["semi-supervised learning", "medical image segmentation", "nnU-Net", "deep learning"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Healthcare Industry",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
    # Makes an editable install one line in a .pth file. Without it setuptools installs an import hook, which costs
    # every start of Python ten times what our own files do.
    package_dir={"": "."},
    packages=find_packages(include=["nnunet_ssl", "nnunet_ssl.*"]),
    package_data={
        "nnunet_ssl": ["py.typed"],
        "nnunet_ssl.figures": ["captions/*.md", "paper.mplstyle"],
        "nnunet_ssl.benchmark": ["Snakefile", "protocols/*.json", "protocols/*.txt"],
    },
    python_requires=">=3.10",
    install_requires=[
        "nnunetv2>=2.8.0,<2.9",
        "torch>=2.6",  # names what a checkpoint may call when it is read
        "batchgenerators>=0.25.3",  # workers that are told how to end
        "batchgeneratorsv2>=0.3.6",  # the direction of a rotation, and how ties between labels are broken
        "dynamic-network-architectures",
        "numpy",
        "pandas",
        "SimpleITK>=2.3",  # with sitkLabelLinear
        "acvl-utils",
        "scipy>=1.15",  # stats.bootstrap(rng=...)
        "tqdm",
        "matplotlib",
        "nibabel",  # reads NIfTI headers and data to the end: SimpleITK passes over truncated files in silence
        "filelock>=3.13",  # locks that a process shares
        "pydantic>=2.7",  # settings and protocols: types with ranges
        "blosc2",  # files of prepared cases, as nnU-Net writes them
        "edt>=3.0",  # exact distance transforms on the CPU, several times as fast as scipy's
        "packaging",
        "psutil",
    ],
    extras_require={
        "benchmark": BENCHMARK,
        "figures": FIGURES,
        "dev": [
            *BENCHMARK,
            *FIGURES,
            "h5py",
            "import-linter",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "mypy>=2,<3",
            "pre-commit",
            "setuptools>=77",
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6",
            "mkdocstrings[python]>=0.29",
        ],
    },
    entry_points={
        "console_scripts": [f"nnUNetv2_ssl_{verb} = nnunet_ssl.commands.{verb}:main" for verb in COMMANDS],
    },
    cmdclass={"build": build_all, "build_startup": build_startup},
)
