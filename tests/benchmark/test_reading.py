"""Reading a protocol: what the fields become, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunet_ssl.benchmark.reading import read_protocol, shipped
from nnunet_ssl.commands import dataset
from nnunet_ssl.errors import UserError

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
OF_RESULTS = {"acdc", "demo_choices", "demo_hosts", "la_equal_time", "sasnet_parts", "shta_parts"}  # of the docs alone


def test_fields_and_defaults(given, write_protocol, tmp_path):
    del given["curve"], given["measure"], given["metrics"]
    protocol = read_protocol(str(write_protocol(given)))
    assert protocol.curve == (1,)
    assert protocol.metrics == ("dice",)
    assert protocol.plans == "nnUNetPlans"
    assert (protocol.measure.epochs, protocol.measure.rounds) == (3, 2)
    assert protocol.data.test == str(tmp_path / "test.txt")  # beside the protocol, not where the command is run
    assert [row.key for row in protocol.rows] == ["labels_only", "cps", "cps_shta", "more_labels"]
    assert [budget.key for budget in protocol.budgets] == ["steps80", "time_of_cps"]
    assert protocol.against(protocol.rows[2]).name == "CPS"
    assert protocol.against(protocol.rows[1]).name == "Labels only"


def set_(*path):
    """A change of the protocol: ``set_("rows", 0, "name", value)``."""

    def change(given):
        *way, last, value = path
        for step in way:
            given = given[step]
        given[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("first_id"), "lacks 'first_id'; give a dataset id from 1 to 999"),
        (set_("epoch", 3), "sets 'epoch', which is not a field here; did you mean 'epochs'"),
        (set_("first_id", 1000), "sets 'first_id' to 1000; it must be a dataset id"),
        (set_("seeds", [0, -1]), "sets 'seeds' to .* whole numbers from 0"),
        (set_("seeds", [0, 0]), "names something twice in 'seeds'"),
        (set_("seeds", [True]), "sets 'seeds'"),
        (set_("labeled", [1.5]), "sets 'labeled'"),
        (set_("labeled", ["all"]), "for a dataset that is split, give the number of cases"),
        (set_("metrics", ["dise"]), "sets 'metrics'"),
        (set_("name", "a/b"), "sets 'name' to 'a/b'"),
        (set_("data", {}), "needs either 'published' or 'dataset'"),
        (set_("data", "published", "la"), "needs either 'published' or 'dataset'"),
        (set_("data", {"dataset": 1}), "lacks 'test'"),
        (set_("data", "test", "no.txt"), "no.txt does not exist"),
        (set_("data", "options", ["--x"]), "'options', which is for 'published'"),
        (set_("data", {"published": "la", "validation": 2}), "'validation', which is for 'dataset'"),
        (
            set_("data", {"published": "amos", "order_by_seed": True}),
            "'order_by_seed', but amos has one published list",
        ),
        (set_("data", {"published": "lung"}), "sets 'published' to 'lung'; it must be one of 'acdc', 'amos'"),
        (set_("rows", 1, "name", "labels ONLY"), r"rows\[1\], is named 'labels ONLY', as another row is"),
        (set_("rows", 1, "name", "a|b"), r"rows\[1\], sets 'name'"),
        (set_("rows", 1, "trainer", "nnUNetTrainerCPSS"), r"rows\[1\], .* did you mean nnUNetTrainerCPS\?"),
        (set_("rows", 1, "trainer", "nnUNetTrainerCPS_10epochs"), "without _<N>epochs"),
        (set_("rows", 1, "trainer", "nnUNetTrainerMAE"), r"rows\[1\], .* does not segment; set 'pretrained_by' to it"),
        (set_("rows", 1, "pretrained_by", "nnUNetTrainerMAEE"), r"'pretrained_by' .* did you mean nnUNetTrainerMAE\?"),
        (set_("rows", 1, "settings", {"cps_weigth": 1}), r"rows\[1\] \(CPS\), sets 'cps_weigth'.*'cps_weight'"),
        (set_("rows", 0, "settings", {"cps_weight": 1}), r"rows\[0\] \(Labels only\), sets 'cps_weight'"),
        (set_("rows", 1, "settings", {"cps_weight": float("nan")}), r"rows\[1\] \(CPS\), sets 'cps_weight' to nan"),
        (set_("rows", 1, "settings", {"cps_weight": int("9" * 401)}), r"rows\[1\] \(CPS\), sets 'cps_weight'"),
        (set_("settings", {"save_every": 0}), "sets 'save_every' among the settings"),
        (
            set_("settings", {"num_val_iterations_per_epoch": 0}),
            r"rows\[0\] .* sets 'num_val_iterations_per_epoch' to 0",
        ),
        (set_("rows", 1, "settings", {"seed": 1}), "sets 'seed' among the settings"),
        (set_("settings", {"keep_epochs": [1]}), "sets 'keep_epochs' among the settings"),
        (set_("rows", 2, "against", "URPC"), r"rows\[2\], sets 'against' to 'URPC'; the rows are Labels only, CPS"),
        (set_("budgets", [{"steps": 81}]), "sets 'steps' to 81; take a multiple of epochs"),
        (set_("budgets", [{"steps": 80, "minutes": 1}]), "needs one of 'steps', 'minutes' and 'time_of'"),
        (set_("budgets", [{}]), "needs one of 'steps'"),
        (set_("budgets", [{"steps": 80}, {"steps": 80}]), r"budgets\[1\], is there twice"),
        (set_("budgets", [{"time_of": "CPS"}]), "also needs a budget in 'steps'"),
        (set_("budgets", [{"steps": 80}, {"time_of": "X"}]), "the rows are"),
        (set_("budgets", [{"minutes": 0}]), "a number above 0"),
        (set_("budgets", [{"minutes": float("nan")}]), "a number above 0"),
        (set_("budgets", [{"minutes": int("9" * 401)}]), "a number above 0"),
        (set_("budgets", [{"steps": int("9" * 401)}]), "a whole number from 1 and below 1e9"),
        (set_("epochs", 10**30), "sets 'epochs'"),
        (set_("epochs", True), "sets 'epochs'"),
        (set_("seeds", [2**32]), "sets 'seeds'"),
        (set_("curve", [float("nan"), 1]), "sets 'curve'"),
        (set_("labeled", [10**30]), "sets 'labeled'"),
        (set_("planning", [float("inf")]), "sets 'planning'"),
        (set_("rows", 5), "sets 'rows' to 5; it must be a list of objects"),
        (set_("rows", 1, 5), "it must be a list of objects"),
        (set_("data", []), r"sets 'data' to \[\]; it must be an object"),
        (set_("rows", 0, "settings", []), r"rows\[0\], sets 'settings' to \[\]; it must be an object of settings"),
        (set_("name", "made_up\n"), "sets 'name'"),
        (set_("rows", 0, "self_training", {"rounds": 2}), r"trainings of Labels only \(3\), 12"),
        (set_("rows", 0, "self_training", {"round": 2}), r"rows\[0\], self_training, sets 'round'"),
        (set_("rows", 0, "self_training", {"student": "nnUNetTrainerCP"}), r"'student' .* mean nnUNetTrainerCPS\?"),
        (set_("rows", 0, "self_training", {"student": "nnUNetTrainerMAE"}), "'student' .* does not segment"),
        (set_("rows", 0, "self_training", {"options": ["--finish", 4]}), "option --finish, .*; remove it"),
        (set_("rows", 0, "self_training", {"options": ["--fin=4"]}), r"rows\[0\], gives .* option --finish"),
        (set_("rows", 1, "self_training", {"student": "nnUNetTrainerURPC"}), "CPS.* sets 'cps_weight'"),
        (set_("rows", 1, "pretrained_by", "nnUNetTrainerCPS"), "'pretrained_by' to its own trainer"),
        (
            lambda p: p["rows"][0].update(trainer="nnUNetTrainerSASNet", pretrained_by="nnUNetTrainerMAE"),
            "the second decoder of nnUNetTrainerSASNet",
        ),
        (set_("figures", ["URPC"]), "sets 'figures' to 'URPC'; the rows are Labels only, CPS"),
        (set_("curve", [0.5]), "increasing shares that end with 1"),
        (set_("curve", [1, 0.5]), "increasing shares"),
        (set_("curve", [0.99, 1]), "increasing shares"),  # of four epochs, both are the last
        (set_("curve", [0.1, 1]), "increasing shares"),  # epoch 0
        (set_("shrink", {"features": [8, 16], "patch_size": [8, 8]}), "shrink, sets 'features' .* three or more"),
        (set_("shrink", {"features": [8, 16, 32]}), "shrink, lacks 'patch_size'"),
        (set_("measure", {"epochs": 1}), "measure, sets 'epochs' to 1; it must be a whole number from 2"),
        (set_("measure", {"seconds": {"CPS": 0}}), "numbers above 0"),
        (set_("measure", {"seconds": {"CPS": float("inf")}}), "numbers above 0"),
        (set_("measure", {"seconds": {"CP": 1}}), "gives 'seconds' of 'CP'; the rows are Labels only, CPS"),
        (set_("rows", 1, "offline", -1), r"rows\[1\], sets 'offline' to -1; it must be a number above 0"),
        (set_("rows", 1, "offline", 1), r"budgets\[1\], sets 'time_of' to a row with 'offline' minutes"),
        (set_("gap", {"lower": "Labels only"}), "gap, lacks 'upper'"),
        (set_("gap", {"lower": "Labels only", "upper": "CP"}), "gap, names the row 'CP'; the rows are Labels only"),
    ],
)
def test_what_is_refused(given, write_protocol, change, message):
    change(given)
    file = write_protocol(given)
    with pytest.raises(UserError, match=message) as error:
        read_protocol(str(file))
    assert str(file) in str(error.value)


def test_offline_work_that_leaves_no_time(given, write_protocol):
    given["budgets"], given["rows"][1]["offline"] = [{"steps": 80}, {"minutes": 2}], 2
    with pytest.raises(UserError, match=r"budgets\[1\], sets 'minutes' to 2, of which the 2 'offline' minutes of CPS"):
        read_protocol(str(write_protocol(given)))


def test_a_file_that_is_no_protocol(write_protocol):
    with pytest.raises(UserError, match="Write one JSON object"):
        read_protocol(str(write_protocol("[]")))


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(
        UserError, match="no_such does not exist; name a JSON file, or one of acdc, acdc_shapes, amos, brats2019"
    ):
        read_protocol("no_such")


@pytest.mark.parametrize("name", shipped())
def test_protocols_that_ship(name):
    """Each is sound and named as its file."""
    protocol = read_protocol(name)
    assert protocol.name == name
    if name in OF_RESULTS:
        return
    assert protocol.rows[0].trainer == "nnUNetTrainerLabeledOnly"  # the baseline
    if name.endswith("_shapes"):  # equal time alone, in which offline work counts
        assert all(budget.minutes for budget in protocol.budgets)
        assert len(protocol.seeds) == 5
    else:
        assert {budget.steps is None for budget in protocol.budgets} == {True, False}  # equal steps and equal time
        assert len(protocol.seeds) == 3


@pytest.mark.parametrize("name", [name for name in shipped() if not name.startswith("demo_")])
def test_the_command_that_makes_a_published_dataset_knows_the_options(name):
    data = read_protocol(name).data
    order = ["--seed", "0"] if data.order_by_seed else []
    with pytest.raises(UserError, match=r"no_such_folder (is not a folder|holds neither)|does not exist"):
        dataset.main([data.published, "--data", "no_such_folder", "-d", "1", *order, *data.options])


def test_every_protocol_of_the_papers_ships():
    papers = [name for name in shipped() if not name.endswith("_shapes") and name not in OF_RESULTS]
    assert {name: read_protocol(name).labeled for name in papers} == {
        "amos": (10,), "brats2019": (25, 50), "hippocampus": (5,), "la": (8, 16), "pancreas_ct": (6, 12),
        "synapse": (4,),
    }  # fmt: skip


def test_the_protocol_of_the_docs_gives_the_steps_that_the_results_name(make_benchmark):
    """As long as CPS + SHTA took for 2,560 steps, by the seconds that the shipped protocol measured."""
    file = RESULTS / "hippocampus_equal_time_protocol.json"
    assert read_protocol(str(file)).shrink == read_protocol("hippocampus").shrink
    benchmark = make_benchmark(json.loads(file.read_text()))
    steps = {run.row.name: run.iterations * 40 * run.row.trainings for run in benchmark.queue()}
    assert steps == {"Labels only": 10720, "SASNet": 2920, "Self-training": 10720, "All labels": 10720}


def test_six_minutes_of_the_left_atrium_are_the_steps_that_the_results_name(make_benchmark):
    benchmark = make_benchmark(json.loads(shipped()["la_equal_time"].read_text()))
    steps = {run.row.name: run.iterations * 40 for run in benchmark.queue()}
    assert steps == {"Labels only": 2080, "CPS + SHTA": 440, "SASNet": 600}


@pytest.mark.parametrize("name", ["demo_choices", "demo_hosts"])
def test_the_demos_protocols_test_on_its_last_cases(name):
    data = read_protocol(name).data
    assert Path(data.test).read_text().split() == [f"case_{number:03d}" for number in range(45, 55)]
