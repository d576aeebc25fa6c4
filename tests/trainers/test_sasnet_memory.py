"""The memory of confidence against a slow oracle."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from torch import Tensor

from nnunet_ssl.losses.branches import Branches
from nnunet_ssl.losses.sar import reweight, true_class_confidence
from nnunet_ssl.trainers.sasnet import memory as module
from nnunet_ssl.trainers.sasnet.memory import ConfidenceMemory

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
RULES = ["last_two", "running"]


def grid(*shape: int) -> Tensor:
    """The coordinates of all voxels of a case, in order."""
    return torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij"))


def fp16(*shape: int) -> Tensor:
    """Random confidences that float16 holds exactly."""
    return torch.rand(*shape).half().float()


def voxels(memory: ConfidenceMemory, case: str = "a") -> Tensor:
    """What the memory says at each voxel center, ``[branches, *shape]``."""
    return memory.read(case, grid(*memory.state()[case].shape[2:]))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------- the memory against an oracle


class Oracle:
    """The memory as one would explain it: for each voxel and branch a list of the values of its visits."""

    def __init__(self, shape: tuple[int, ...], rule: str) -> None:
        self.shape, self.rule = shape, rule
        self.visits: dict[tuple[int, ...], list[list[float]]] = {}

    def write(self, coords: Tensor, values: Tensor) -> None:
        meet: dict[tuple[int, ...], list[list[float]]] = {}
        for x, value in zip(coords.flatten(1).T.tolist(), values.flatten(1).T.tolist(), strict=True):
            if all(-0.5 <= c <= n - 0.5 for c, n in zip(x, self.shape, strict=True)):
                nearest = tuple(min(int(c + 0.5), n - 1) for c, n in zip(x, self.shape, strict=True))
                meet.setdefault(nearest, []).append(value)
        for voxel, found in meet.items():
            mean = [sum(of_branch) / len(found) for of_branch in zip(*found, strict=True)]
            self.visits.setdefault(voxel, []).append(mean)

    def read(self, branches: int) -> Tensor:
        field = torch.full((branches, *self.shape), 0.5)
        for voxel, visits in self.visits.items():
            for branch in range(branches):
                values = [visit[branch] for visit in visits]
                if self.rule == "last_two":
                    value = sum(values[-2:]) / len(values[-2:])
                else:
                    value = values[0]
                    for new in values[1:]:
                        value = (value + new) / 2
                field[(branch, *voxel)] = value
        return field


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(6, 7), (4, 5, 6)])
@pytest.mark.parametrize("branches", [2, 3])
def test_visits_are_remembered_as_an_oracle_does(rule, device, shape, branches):
    """Random patches, in and out of the case, several voxels on one, NaN here and there."""
    memory, oracle = ConfidenceMemory({"a": shape, "b": shape}, rule, branches, device), Oracle(shape, rule)
    for _ in range(8):
        patch = (5,) * len(shape)
        coords = (torch.rand(len(shape), *patch) * 1.4 - 0.2) * torch.tensor(shape).view(-1, *[1] * len(shape))
        coords[0][torch.rand(patch) < 0.1] = torch.nan
        values = torch.rand(branches, *patch)
        memory.write("a", coords.to(device), values.to(device))
        oracle.write(coords, values)
    expected = oracle.read(branches)
    assert (expected == 0.5).any()
    assert max(len(visits) for visits in oracle.visits.values()) >= 3
    torch.testing.assert_close(voxels(memory), expected, rtol=0, atol=2e-3)  # float16 at each visit
    assert (voxels(memory, "b") == 0.5).all()


def test_last_two_forgets_what_came_before():
    memory, where = ConfidenceMemory({"a": (2, 2)}, "last_two"), grid(2, 2)
    for value, mean in ((0.25, 0.25), (0.75, 0.5), (1.0, 0.875), (0.0, 0.5)):
        memory.write("a", where, torch.full((2, 2, 2), value))
        assert (voxels(memory) == mean).all()


def test_running_is_the_released_codes_blend():
    memory, where = ConfidenceMemory({"a": (2, 2)}, "running"), grid(2, 2)
    for value, mean in ((0.25, 0.25), (0.75, 0.5), (1.0, 0.75), (0.0, 0.375)):
        memory.write("a", where, torch.full((2, 2, 2), value))
        assert (voxels(memory) == mean).all()


def test_each_branch_of_each_case_has_its_own_values():
    """The released code writes branch 0 of one case where branch 1 of another should be."""
    memory = ConfidenceMemory({"a": (2, 3), "b": (2, 3)})
    values = {case: fp16(2, 2, 3) for case in "ab"}
    for case in "ab":
        memory.write(case, grid(2, 3), values[case])
    for case in "ab":
        assert torch.equal(voxels(memory, case), values[case])


def test_voxels_that_meet_are_averaged_the_same_way_each_time():
    coords, values = torch.rand(3, 20, 20, 20) * 4, torch.rand(2, 20, 20, 20)
    memories = [ConfidenceMemory({"a": (5, 5, 5)}) for _ in range(3)]
    for memory in memories:
        memory.write("a", coords, values)
    oracle = Oracle((5, 5, 5), "last_two")
    oracle.write(coords, values)
    torch.testing.assert_close(voxels(memories[0]), oracle.read(2), rtol=0, atol=1e-3)
    for memory in memories[1:]:
        assert torch.equal(memory.state()["a"], memories[0].state()["a"])


def test_a_patch_half_a_voxel_off_reaches_every_voxel():
    """Rounding halves to even numbers would leave out every second one."""
    memory = ConfidenceMemory({"a": (8, 8)})
    memory.write("a", grid(7, 7) + 0.5, torch.zeros(2, 7, 7))
    assert (voxels(memory)[:, 1:, 1:] == 0).all()


# ---------------------------------------------------------------- reading


VIEWS = {
    "crop": lambda x: x[:, 1:5, 2:6, 3:7],
    "permuted crop": lambda x: x[:, 1:5, 2:6, 3:7].permute(0, 3, 1, 2),
    "mirrored": lambda x: x.flip(1, 3),
    "permuted and mirrored": lambda x: x.flip(2).permute(0, 2, 1, 3),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("write_view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("read_view", VIEWS.values(), ids=VIEWS)
def test_crops_permutations_and_mirrors_are_exact(rule, device, write_view, read_view):
    """What one view wrote another reads, bit for bit; what it did not reach is neutral."""
    memory = ConfidenceMemory({"a": (6, 7, 8)}, rule, device=device)
    coords, values = grid(6, 7, 8), fp16(2, 6, 7, 8)
    memory.write("a", write_view(coords).to(device), write_view(values).to(device))
    number = torch.arange(values[0].numel()).view(1, 6, 7, 8)
    expected = values.where(torch.isin(number, write_view(number)), 0.5)
    assert torch.equal(memory.read("a", read_view(coords).to(device)).cpu(), read_view(expected))


def test_interpolation_between_voxel_centers_is_multilinear():
    """A field that is linear in the position is read back without error; at corners of four voxels their mean."""
    memory = ConfidenceMemory({"a": (9, 5, 17)})
    case = grid(9, 5, 17)
    linear = case[0] / 16 + case[1] / 32 + case[2] / 64  # exact in float16
    memory.write("a", case, torch.stack([linear, 1 - linear]))
    coords = torch.rand(3, 6, 6, 6) * torch.tensor([8.0, 4.0, 16.0]).view(3, 1, 1, 1)
    read = memory.read("a", coords)
    torch.testing.assert_close(read[0], coords[0] / 16 + coords[1] / 32 + coords[2] / 64, rtol=0, atol=1e-6)
    torch.testing.assert_close(read[1], 1 - read[0], rtol=0, atol=1e-6)


def test_at_the_border_and_beyond():
    memory = ConfidenceMemory({"a": (3, 4)})
    values = fp16(2, 3, 4)
    memory.write("a", grid(3, 4), values)
    nan, inf = float("nan"), float("inf")
    points = torch.tensor(
        [[-0.5, 1], [2.5, 1], [1, 3.5], [-0.51, 1], [2.51, 1], [1, 3.51], [nan, 1], [1, nan], [inf, 1], [1, -inf]]
    ).T[:, None]
    read = memory.read("a", points)[:, 0]
    assert torch.equal(read[:, :3], torch.stack([values[:, 0, 1], values[:, 2, 1], values[:, 1, 3]], 1))
    assert (read[:, 3:] == 0.5).all()

    before = memory.state()["a"].clone()
    memory.write("a", points[:, :, 3:], torch.rand(2, 1, 7))
    assert torch.equal(memory.state()["a"], before)
    memory.write("a", points[:, :, :1], torch.zeros(2, 1, 1))
    assert (memory.state()["a"][1, :, 0, 1] == 0).all()
    assert (memory.state()["a"] != before).sum() == 2


def test_what_was_never_visited_is_neutral_also_between_voxels():
    memory = ConfidenceMemory({"a": (4,)})
    assert (memory.read("a", torch.linspace(-0.5, 3.5, 9)[None]) == 0.5).all()
    memory.write("a", torch.tensor([[1.0]]), torch.tensor([[1.0], [0.0]]))
    read = memory.read("a", torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0]]))
    assert torch.equal(read, torch.tensor([[0.5, 0.75, 1.0, 0.75, 0.5], [0.5, 0.25, 0.0, 0.25, 0.5]]))


def test_the_bin_stays_empty():
    """What lands in it must not look like a visited voxel of the next write, nor spread NaN."""
    memory = ConfidenceMemory({"a": (2,)}, "running")
    for value in (0.2, float("nan"), 0.4):
        memory.write("a", torch.tensor([[5.0, 0.0]]), torch.tensor([[value, 0.5], [0.5, 0.5]]))
        assert (memory._values["a"][..., -1] == module.NEVER).all()
    assert torch.equal(voxels(memory), torch.full((2, 2), 0.5))


def test_values_that_are_not_finite_are_not_written():
    """A network that overflowed once must not spoil the memory for good."""
    memory = ConfidenceMemory({"a": (3,)})
    memory.write("a", grid(3), torch.tensor([[0.25, float("nan"), 0.25], [0.25, 0.25, float("inf")]]))
    assert torch.equal(voxels(memory), torch.tensor([[0.25, 0.5, 0.5]] * 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_confidences_in_half_precision(dtype):
    memory = ConfidenceMemory({"a": (4, 4)})
    values = torch.full((2, 4, 4), 0.75, dtype=dtype)
    memory.write("a", grid(4, 4), values)
    read = memory.read("a", grid(4, 4))
    assert read.dtype == torch.float32
    assert (read == 0.75).all()


def test_a_slice_of_a_volume():
    """A 2D patch in a 3D case: the slice's number is a coordinate, and other slices do not change."""
    memory = ConfidenceMemory({"a": (4, 5, 6)})
    coords = torch.cat([torch.full((1, 5, 6), 2.0), grid(5, 6)])
    values = fp16(2, 5, 6)
    memory.write("a", coords, values)
    assert torch.equal(memory.read("a", coords.flip(1)), values.flip(1))
    untouched = [0, 1, 3]
    assert (memory.state()["a"][:, :, untouched] == module.NEVER).all()


def test_ignored_voxels_stay_neutral():
    """Their confidence is 0.5, and what the trainer marks with NaN is not even a visit."""
    prob = torch.rand(1, 3, 4, 4).softmax(1)
    labels = torch.randint(0, 3, (1, 4, 4))
    labels[0, :2] = 3
    memory = ConfidenceMemory({"a": (4, 4)})
    confidence = true_class_confidence(prob, labels)
    memory.write("a", grid(4, 4).masked_fill(labels == 3, torch.nan), confidence.expand(2, 4, 4))
    read = voxels(memory)
    assert (read[:, :2] == 0.5).all()
    assert torch.equal(read[0, 2:], prob[0].gather(0, labels.clamp(max=2))[0, 2:].half().float())
    assert (memory.state()["a"][:, :, :2] == module.NEVER).all()


def test_nothing_of_the_graph_is_kept():
    memory = ConfidenceMemory({"a": (3,)})
    memory.write("a", grid(3), torch.full((2, 3), 0.5, requires_grad=True).sigmoid())
    assert not memory.state()["a"].requires_grad
    assert not memory.read("a", grid(3).requires_grad_()).requires_grad


def test_through_nnunets_rotation_and_scaling():
    """A smooth field, written through rotated, scaled and deformed patches, is read back through others."""
    shape, patch = (30, 32, 34), (24, 24, 24)

    def field(coords: Tensor) -> Tensor:
        z, y, x = coords
        return torch.stack([0.5 + 0.4 * torch.sin(z / 5) * torch.cos(y / 6), 0.5 + 0.4 * torch.cos(x / 5 + y / 8)])

    steepest = 0.4 * (1 / 5**2 + 1 / 6**2) ** 0.5  # bound of the gradient, per voxel
    transform = SpatialTransform(
        patch,
        patch_center_dist_from_border=12,
        random_crop=True,
        p_rotation=1,
        rotation=(-0.6, 0.6),
        p_scaling=1,
        scaling=(0.7, 1.4),
        p_elastic_deform=0.5,
        elastic_deform_scale=(0.2, 0.3),
        elastic_deform_magnitude=(0, 2),
    )

    def patch_coordinates() -> Tensor:
        carried = transform(image=torch.cat([grid(*shape), torch.ones(1, *shape)]))["image"]
        return (carried[:3] / carried[3:]).where(carried[3:] >= 0.999, torch.nan)

    memory = ConfidenceMemory({"a": shape})
    for _ in range(40):
        coords = patch_coordinates()
        memory.write("a", coords, field(coords).nan_to_num(0))
    visited = memory.state()["a"][0, 0] >= 0
    assert visited.float().mean() > 0.9

    error = (voxels(memory) - field(grid(*shape))).abs()[:, visited]
    assert error.max() < steepest * 3**0.5 / 2 + 0.01  # nearest voxel: half a diagonal away at most
    assert error.mean() < 0.02

    inner = [slice(3, n - 3) for n in shape]
    known = torch.zeros(shape, dtype=torch.bool)
    known[tuple(inner)] = visited[tuple(inner)]
    for _ in range(3):
        coords = patch_coordinates()
        low = coords.nan_to_num(0).floor().long()
        eight = [
            tuple(low + torch.tensor(c).view(3, 1, 1, 1)) for c in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist()
        ]
        surrounded = torch.stack(
            [known[tuple(i.clamp(0, n - 1) for i, n in zip(at, shape, strict=True))] for at in eight]
        ).all(0)
        assert surrounded.float().mean() > 0.3
        error = (memory.read("a", coords) - field(coords)).abs()[:, surrounded]
        assert error.max() < steepest * 3**0.5 / 2 + 0.02
        assert error.mean() < 0.02


# ---------------------------------------------------------------- size, files, checkpoint


def test_bytes_are_known_before_they_are_taken():
    shapes = {"a": (4, 5, 6), "b": (3, 3, 3)}
    for rule, slots in (("last_two", 2), ("running", 1)):
        for branches in (1, 2):
            memory = ConfidenceMemory(shapes, rule, branches)
            expected = 2 * slots * branches * ((120 + 1) + (27 + 1))
            assert memory.nbytes == ConfidenceMemory.bytes_needed(shapes, rule, branches) == expected


@pytest.mark.parametrize("rule", RULES)
def test_files_hold_what_ram_holds(rule, tmp_path: Path):
    shapes = {"a": (5, 6, 7), "odd/name": (3, 4)}
    in_ram = ConfidenceMemory(shapes, rule)
    on_disk = ConfidenceMemory(shapes, rule, folder=str(tmp_path / "new" / "folder"))
    assert on_disk.nbytes == in_ram.nbytes
    for _ in range(3):
        for case, shape in shapes.items():
            coords = torch.rand(len(shape), 6, 6) * torch.tensor(shape).view(-1, 1, 1)
            values = torch.rand(2, 6, 6)
            for memory in (in_ram, on_disk):
                memory.write(case, coords, values)
            assert torch.equal(in_ram.read(case, coords), on_disk.read(case, coords))
    for case in shapes:
        assert torch.equal(in_ram.state()[case], on_disk.state()[case])


def test_files_take_disk_and_are_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file has its full size before it is mapped, and no name when the memory stands."""
    sizes = {}
    from_file = torch.from_file

    def look(name: str, **kwargs: object) -> Tensor:
        sizes[name] = Path(name).stat().st_size
        return from_file(name, **kwargs)

    monkeypatch.setattr(torch, "from_file", look)
    shapes = {"a": (80, 90, 100)}  # more than one chunk
    memory = ConfidenceMemory(shapes, folder=str(tmp_path))
    assert list(sizes.values()) == [ConfidenceMemory.bytes_needed(shapes)]
    assert all(Path(name).parent == tmp_path for name in sizes)
    assert (memory.state()["a"] == module.NEVER).all()
    del memory
    gc.collect()
    assert not any(tmp_path.iterdir())


def test_a_memory_moves_to_another_device_with_what_it_remembers(tmp_path: Path):
    memory = ConfidenceMemory({"a": (4, 5)}, folder=str(tmp_path))
    values = fp16(2, 4, 5)
    memory.write("a", grid(4, 5), values)
    memory.to("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.equal(voxels(memory), values)
    memory.to("meta")
    assert memory.device.type == memory.state()["a"].device.type == "meta"
    gc.collect()
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_an_error_at_the_start_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    real = os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda handle, mode: real(os.open("/dev/full", os.O_WRONLY), mode))
    with pytest.raises(OSError, match="No space"):
        ConfidenceMemory({"a": (10, 10)}, folder=str(tmp_path))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_state_survives_a_checkpoint(rule, device, tmp_path: Path):
    shapes = {"a": (4, 5, 6), "b": (3, 4, 5)}
    first = ConfidenceMemory(shapes, rule, device=device)
    coords, values = torch.rand(3, 4, 4, 4) * 4, torch.rand(2, 4, 4, 4)
    first.write("a", coords, values)
    torch.save(first.state(), tmp_path / "state.pt")

    second = ConfidenceMemory(shapes, rule, folder=str(tmp_path / "files"))
    second.load_state(torch.load(tmp_path / "state.pt", map_location="cpu"))
    for memory in (first, second):
        memory.write("a", coords.flip(1), values)  # the history goes on alike
    for case in shapes:
        assert torch.equal(first.state()[case].cpu(), second.state()[case])
    assert (voxels(second, "b") == 0.5).all()


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    memory = ConfidenceMemory({"a": (4, 6), "b": (2, 2)})
    memory.write("a", grid(4, 6), torch.rand(2, 4, 6))
    before = memory.state()["a"].clone()
    others = [
        ConfidenceMemory({"a": (4, 6), "b": (2, 3)}),
        ConfidenceMemory({"a": (6, 4), "b": (2, 2)}),
        ConfidenceMemory({"a": (4, 6)}),
        ConfidenceMemory({"a": (4, 6), "b": (2, 2), "c": (1,)}),
        ConfidenceMemory({"a": (4, 6), "b": (2, 2)}, "running"),
        ConfidenceMemory({"a": (4, 6), "b": (2, 2)}, branches=3),
    ]
    for other in others:
        with pytest.raises(ValueError, match="stored memory of confidence"):
            memory.load_state(other.state())
        assert torch.equal(memory.state()["a"], before)


def test_what_does_not_fit_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="on the CPU"):
        ConfidenceMemory({"a": (2,)}, device="cuda", folder=str(tmp_path))
    memory = ConfidenceMemory({"a": (2, 3)})
    with pytest.raises(KeyError):
        memory.read("b", grid(2, 3))
    with pytest.raises(ValueError, match="zip"):
        memory.read("a", grid(2, 3, 4))
    with pytest.raises(ValueError, match="zip"):
        memory.write("a", grid(2, 3, 4), torch.rand(2, 2, 3, 4))
    with pytest.raises(ValueError, match="do not fit 2 branches"):
        memory.write("a", grid(2, 3), torch.rand(3, 2, 3))
    with pytest.raises(ValueError, match="do not fit"):
        memory.write("a", grid(2, 3), torch.rand(2, 3, 2))


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize("call", ["read", "write"])
def test_a_call_takes_no_memory_of_the_size_of_the_case(call):
    """The same patch costs the same in a case a thousand times as large."""
    shape, patch = (100, 100, 100), (4, 4, 4)
    memory = ConfidenceMemory({"a": shape})
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != stored:
                largest = max(largest, out.numel())
            return out

    stored = memory._values["a"].untyped_storage().data_ptr()
    coords = grid(*patch) + 30.3
    with Watch():
        memory.read("a", coords) if call == "read" else memory.write("a", coords, torch.rand(2, *patch))
    assert 0 < largest <= 4 * 64 * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_is_never_waited_for():
    memory = ConfidenceMemory({"a": (20, 20, 20)}, device="cuda")
    coords, values = grid(8, 8, 8).cuda() + 1.3, torch.rand(2, 8, 8, 8, device="cuda")
    prob, labels = torch.rand(1, 3, 8, 8, device="cuda"), torch.zeros(1, 8, 8, dtype=torch.int16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            memory.write("a", coords, values)
            memory.read("a", coords)
        confidence = true_class_confidence(prob, labels)
        reweight(Branches(high=prob, low=prob), Branches(high=confidence, low=confidence), 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_memory_on_the_cpu_serves_patches_on_the_gpu():
    memory = ConfidenceMemory({"a": (5, 6, 7)})
    values = fp16(2, 5, 6, 7).cuda()
    memory.write("a", grid(5, 6, 7).cuda(), values)
    read = memory.read("a", grid(5, 6, 7).cuda())
    assert read.is_cuda
    assert torch.equal(read, values)
