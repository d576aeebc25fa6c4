"""What this package takes for granted about nnU-Net, so that a new nnU-Net fails here, with a word, and not in a run.

When a test of this file fails after an update of nnU-Net: read what changed there, bring ours (the message names it) in
line, then add the new digest or name to the lists below. 2.8.0 and 2.8.1 agree in every digest.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from nnunet_ssl import trainers
from nnunet_ssl.commands.trainers import NNUNET

ROOT = Path(__file__).resolve().parent.parent
TRAINER = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer:nnUNetTrainer"
LOADER = "nnunetv2.training.dataloading.data_loader:nnUNetDataLoader"
WORKERS = "batchgenerators.dataloading.nondet_multi_threaded_augmenter"
PREDICTOR = "nnunetv2.inference.predict_from_raw_data:nnUNetPredictor"
BASE = "nnunet_ssl/trainers/base.py"
STEP = "nnunet_ssl/trainers/step.py"
EPOCH = "nnunet_ssl/trainers/epoch.py"
OPTIMIZERS = "nnunet_ssl/trainers/optimizers.py"
DATA = "nnunet_ssl/trainers/data.py"
RESUMING = "nnunet_ssl/trainers/resuming.py"
SASNET = "nnunet_ssl/trainers/sasnet"
MAE = "nnunet_ssl/trainers/mae.py"


class Body(NamedTuple):
    """A function of nnU-Net whose inside ours follows or relies on.

    Attributes:
        name: ``module:qualified.name``.
        ours: what to compare with it when it has changed.
        digests: of its syntax tree in the versions that ours was compared with.
    """

    name: str
    ours: str
    digests: tuple[str, ...]


BODIES = [
    Body(f"{TRAINER}.__init__", f"{BASE}: __init__; {RESUMING}: _settings_in_force", ("8fc3b9d802cde1fc",)),
    Body(f"{TRAINER}.initialize", f"{BASE}: initialize", ("a9025b1eee2b13bb",)),
    Body(f"{TRAINER}._build_loss", f"{BASE}: _build_loss", ("c58eb7adf857f962",)),
    Body(f"{TRAINER}.configure_optimizers", f"{OPTIMIZERS}: _configure_training_optimizers", ("16b2fdcadbd08caf",)),
    Body(f"{TRAINER}.get_dataloaders", f"{DATA}, {MAE}: get_dataloaders, _start", ("e6db45e63de3541d",)),
    Body(
        f"{TRAINER}.configure_rotation_dummyDA_mirroring_and_inital_patch_size",
        "nnunet_ssl/trainers/magicnet.py: the same name",
        ("6baa6c01eef90f7d",),
    ),
    Body(f"{TRAINER}.run_training", f"{EPOCH}; {DATA}: the same name", ("99cbe91840533f19",)),
    Body(f"{TRAINER}.on_train_start", f"{BASE}: on_train_start", ("6a393021a4206d6f",)),
    Body(f"{TRAINER}.on_train_end", f"{RESUMING}: on_train_end", ("208921d5b434ffd7",)),
    Body(f"{TRAINER}.on_train_epoch_start", f"{EPOCH}: on_train_epoch_start", ("c26c11b5c3c434a0",)),
    Body(f"{TRAINER}.train_step", f"{STEP}: train_step, autocast; {OPTIMIZERS}: _update", ("dc057463f20b4b0d",)),
    Body(f"{TRAINER}.on_train_epoch_end", f"{EPOCH}: on_train_epoch_end", ("c87d0887bc8d4989",)),
    Body(f"{TRAINER}.on_epoch_end", f"{EPOCH}: on_epoch_end", ("c49850ef9e895f5a",)),
    Body(f"{TRAINER}.set_deep_supervision_enabled", f"{BASE}: forward; {STEP}: full_resolution", ("0276e71584011600",)),
    Body(f"{TRAINER}.save_checkpoint", f"{RESUMING}: save_checkpoint", ("7b22f7066419c20d",)),
    Body(f"{TRAINER}.load_checkpoint", f"{RESUMING}: load_checkpoint", ("032f47b8c9595665",)),
    Body(
        f"{TRAINER}.build_network_architecture",
        f"{SASNET}/trainer.py: dual_branch_network; {MAE}: the same name",
        ("67303549563758cc",),
    ),
    Body(f"{TRAINER}.validation_step", f"{SASNET}, {MAE}: validation_step", ("34e6c04ac4bb718f",)),
    Body(f"{TRAINER}.on_validation_epoch_start", f"{EPOCH}: the same name", ("db6d0a16a9f84fff",)),
    Body(f"{TRAINER}.on_validation_epoch_end", f"{SASNET}, {MAE}: on_validation_epoch_end", ("a84111b14ea1708d",)),
    Body(f"{TRAINER}.perform_actual_validation", f"{SASNET}, {MAE}: perform_actual_validation", ("c3b109421a9c74cf",)),
    Body(
        f"{LOADER}.__init__", "nnunet_ssl/unlabeled/loader.py: UnlabeledLoader, TwoStreamLoader", ("0cd222305f61c2d4",)
    ),
    Body(
        f"{LOADER}.get_bbox",
        "nnunet_ssl/unlabeled/loader.py: UnlabeledLoader; nnunet_ssl/trainers/sasnet/coordinates.py: CoordinateLoader",
        ("9f214d1f2a89c328",),
    ),
    Body(
        f"{LOADER}.generate_train_batch",
        "nnunet_ssl/unlabeled/loader.py: TwoStreamLoader; nnunet_ssl/trainers/sasnet/coordinates.py: CoordinateLoader",
        ("663388f10118c4ef",),
    ),
    *(
        Body(f"{WORKERS}:{name}", "nnunet_ssl/unlabeled/loader.py: OrderedWorkers", digests)
        for name, digests in {
            "producer": ("faeff4c2c988e941",),
            "NonDetMultiThreadedAugmenter.__init__": ("2ab3c812bb7f6dd1",),
            "NonDetMultiThreadedAugmenter.__next__": ("86b0b7d0b30e253d",),
            "NonDetMultiThreadedAugmenter._start": ("cc5085049812e715",),
            "NonDetMultiThreadedAugmenter._finish": ("52287a1d4824838d",),
        }.items()
    ),
    Body(
        "nnunetv2.training.dataloading.nnunet_dataset:nnUNetDatasetBlosc2.load_case",
        "nnunet_ssl/unlabeled/loader.py: UnlabeledDataset",
        ("b15f8fc80c6eafcb",),
    ),
    Body(
        "nnunetv2.training.dataloading.nnunet_dataset:nnUNetDatasetBlosc2.save_case",
        "nnunet_ssl/shapes/case.py: _save",
        ("ec34e0d9c6167652",),
    ),
    Body(
        "nnunetv2.preprocessing.preprocessors.default_preprocessor:DefaultPreprocessor._sample_foreground_locations",
        "nnunet_ssl/shapes/case.py: _save",
        ("a4f6b2198d7e023e",),
    ),
    Body(
        "nnunetv2.preprocessing.preprocessors.default_preprocessor:DefaultPreprocessor.run_case_save",
        "nnunet_ssl/unlabeled/prepare.py: how a case is prepared",
        ("b2d5c6718dd194a0",),
    ),
    Body(
        "nnunetv2.run.run_training:maybe_load_checkpoint",
        f"{RESUMING}: load_checkpoint, _load_training_state (which file --c takes, and when)",
        ("67c8d027867932b0",),
    ),
    Body(
        "nnunetv2.run.load_pretrained_weights:load_pretrained_weights",
        f"{MAE}: the heads are what is left out; docs/pretraining.md",
        ("e409ef06f315608e",),
    ),
    Body(
        f"{PREDICTOR}.initialize_from_trained_model_folder",
        f"{RESUMING}: save_checkpoint; nnunet_ssl/export.py (what a predictor reads)",
        ("3f1ca0074c021fc1",),
    ),
    Body(
        "nnunetv2.utilities.find_objects:recursive_find_trainer_class_by_name",
        "nnunet_ssl/_startup.py, nnunet_ssl/_ext/nnunet_ssl_ext.py",
        ("1fdbf7f9ecd222f5",),
    ),
    Body(
        "nnunetv2.utilities.find_class_by_name:_recursive_find_python_class",
        "nnunet_ssl/_ext/nnunet_ssl_ext.py, nnunet_ssl/trainers/__init__.py: __getattr__",
        ("b34ed8ba0d48b62b",),
    ),
    Body(
        "nnunetv2.utilities.find_class_by_name:temporarily_cleanup_imports_from_path",
        "nnunet_ssl/trainers/__init__.py: of_the_user",
        ("4ce41574c24f5a09",),
    ),
]

CONSTRUCTOR = ["plans", "configuration", "fold", "dataset_json", "device"]
NETWORK_BUILDER = [
    "plans_manager",
    "configuration_manager",
    "num_input_channels",
    "num_output_channels",
    "enable_deep_supervision",
]
CHECKPOINT = {
    "network_weights",
    "optimizer_state",
    "grad_scaler_state",
    "logging",
    "_best_ema",
    "current_epoch",
    "init_args",
    "trainer_name",
    "inference_allowed_mirroring_axes",
}
READ_BY_PREDICTOR = {"trainer_name", "init_args", "inference_allowed_mirroring_axes", "network_weights"}


def find(name: str) -> Any:
    """The object that ``module:qualified.name`` names."""
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def shape(node: Any) -> Any:
    """A syntax tree as nested lists, without places in the file and without what is empty.

    ``ast.dump`` and ``ast.unparse`` write the same code differently from one Python to the next. These lists are the
    same from 3.10 to 3.13, checked on every function above in nnU-Net 2.8.0 and 2.8.1.
    """
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
        return [type(node).__name__, *([name, shape(value)] for name, value in fields)]
    return [shape(each) for each in node] if isinstance(node, list) else repr(node)


def digest(source: str) -> str:
    """Of what a function does: its syntax tree without docstrings, so comments and formatting are nothing to it."""
    tree = ast.parse(f"class _:\n{source}" if source[0].isspace() else source)
    function = tree.body[0].body[0] if source[0].isspace() else tree.body[0]
    for node in ast.walk(function):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(repr(shape(function)).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("source", "same"),
    [
        ("def f(x):\n    return x + 1\n", True),
        ("    def f(x):\n        return x + 1\n", True),
        ('def f( x ):  # a comment\n    """A docstring."""\n\n    return (x\n            + 1)\n', True),
        ("def f(x):\n    return x + 2\n", False),
        ("def f(x, y=None):\n    return x + 1\n", False),
        ("@staticmethod\ndef f(x):\n    return x + 1\n", False),
        ("def f(x):\n    print(x)\n    return x + 1\n", False),
    ],
)
def test_a_digest_is_of_what_is_done(source: str, same: bool) -> None:
    assert (digest(source) == digest("def f(x):\n    return x + 1\n")) is same


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name.partition(":")[2])
def test_body_is_one_that_ours_was_compared_with(body: Body) -> None:
    version = importlib.metadata.version("nnunetv2")
    try:
        function = find(body.name)
    except (ImportError, AttributeError):
        pytest.fail(f"nnU-Net {version} has no {body.name} any more; rework {body.ours}", pytrace=False)
    if (found := digest(inspect.getsource(function))) not in body.digests:
        pytest.fail(
            f"nnU-Net {version} changed {body.name}: compare it with {body.ours}, "
            f"then add the digest {found!r} to this test",
            pytrace=False,
        )


def nnunet_trainer() -> type:
    return find(TRAINER)


def our_trainers() -> list[type]:
    return [getattr(trainers, name) for name in trainers.TRAINERS]


def test_constructor_takes_what_we_take() -> None:
    """nnU-Net's constructor looks up each parameter name of a subclass's among its own."""
    assert list(inspect.signature(nnunet_trainer()).parameters) == CONSTRUCTOR
    for trainer in our_trainers():
        assert list(inspect.signature(trainer).parameters) == CONSTRUCTOR, trainer


def test_network_builder_takes_what_we_pass() -> None:
    """nnU-Net looks for a parameter of the name ``plans_manager`` to choose how to call it."""
    assert list(inspect.signature(nnunet_trainer().build_network_architecture).parameters) == NETWORK_BUILDER
    for trainer in our_trainers():
        assert list(inspect.signature(trainer.build_network_architecture).parameters) == NETWORK_BUILDER, trainer


def overridden() -> list[tuple[type, str]]:
    """Every method or property of nnU-Net's trainer that a class of ours replaces."""
    base = nnunet_trainer()
    ours = {cls for trainer in our_trainers() for cls in trainer.__mro__ if cls.__module__.startswith("nnunet_ssl")}
    return [
        (cls, name)
        for cls in sorted(ours, key=lambda cls: cls.__name__)
        for name in vars(cls)
        if hasattr(base, name) and not hasattr(object, name) and callable(getattr(base, name))
    ]


def test_hooks_are_called_as_ours_expect() -> None:
    assert ("Step", "train_step") in [(cls.__name__, name) for cls, name in overridden()]
    for cls, name in overridden():
        ours, theirs = (inspect.signature(getattr(c, name)).parameters for c in (cls, nnunet_trainer()))
        assert list(ours) == list(theirs), f"nnU-Net's {name}{tuple(theirs)}: compare with {cls.__name__}.{name}"


def test_every_hook_that_ours_rewrites_is_watched() -> None:
    """An override that this file does not know of would change unseen."""
    watched = {body.name.rpartition(".")[2] for body in BODIES if body.name.startswith(TRAINER)}
    missing = sorted({name for _, name in overridden()} - watched)
    assert not missing, f"add {missing} to BODIES"


def test_our_names_do_not_meet_nnunets_attributes(tiny: Callable, make_trainer: Callable) -> None:
    """An attribute of the same name that nnU-Net comes to use would be overwritten without a word."""
    theirs = set(vars(make_trainer("nnUNetTrainer", tiny("3d"))))
    ours = set(vars(make_trainer("nnUNetTrainerSHTA_CPS", tiny("3d")))) - theirs
    properties = {name for cls in our_trainers() for c in cls.__mro__ if c.__module__.startswith("nnunet_ssl")
                  for name in vars(c)}  # fmt: skip
    methods = {name for _, name in overridden()}
    assert not properties & theirs
    assert not {name for name in ours if hasattr(nnunet_trainer(), name)} - methods


def test_checkpoint_holds_what_nnunets_does(tiny: Callable, make_trainer: Callable, tmp_path: Path) -> None:
    keys = {}
    for name in ("nnUNetTrainer", "nnUNetTrainerLabeledOnly", "nnUNetTrainerSHTA_CPS"):
        trainer = make_trainer(name, tiny("3d"))
        trainer.save_checkpoint(str(tmp_path / f"{name}.pth"))
        checkpoint = torch.load(tmp_path / f"{name}.pth", weights_only=False)
        keys[name] = set(checkpoint), list(checkpoint["network_weights"]), set(checkpoint["init_args"])
    assert keys["nnUNetTrainer"][0] == CHECKPOINT
    assert keys["nnUNetTrainer"] == keys["nnUNetTrainerLabeledOnly"] == keys["nnUNetTrainerSHTA_CPS"]


def test_predictor_reads_what_we_write() -> None:
    source = inspect.getsource(find(f"{PREDICTOR}.initialize_from_trained_model_folder"))
    assert set(re.findall(r"checkpoint\['(\w+)'\]", source)) == READ_BY_PREDICTOR
    assert READ_BY_PREDICTOR <= CHECKPOINT


def test_setup_and_check_name_the_same_versions() -> None:
    """setup.py says which nnU-Net to install, ``nnUNetv2_ssl_trainers --check`` which one is right."""
    wanted = f'"nnunetv2{NNUNET}"'
    assert wanted in (ROOT / "setup.py").read_text(encoding="utf-8")
