"""The artefact: what is saved comes back bit for bit; a file that is not what was saved is an ArtefactError."""

import copy
import json
import os
import pickle
import random
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import fx, nn

from structadmm.allowed import FUNCTIONS, KINDS, METHODS
from structadmm.artefact import load, save
from structadmm.container import DIGEST_KEY, MANIFEST_KEY, sha256_of
from structadmm.errors import ArtefactError
from structadmm.manifest import rebuild
from structadmm.nn import ChannelBias, CompactConv2d, CompactLinear, DropPath


class Leaves(fx.Tracer):
    def is_leaf_module(self, m, name):
        return True


def children_called(model):
    """A graph that calls the model's children, whatever they are."""
    return fx.GraphModule(model, Leaves().trace(model))


class Residual(nn.Module):
    """What the format has to carry: slices, pads, attributes, dropout, tied and frozen weights."""

    def __init__(self, c=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True))
        self.a = nn.Conv2d(c, 2 * c, 3, stride=2, padding=1)
        self.b = nn.Conv2d(2 * c, 2 * c, (3, 1), padding="same", groups=2)
        self.b2 = nn.Conv2d(2 * c, 2 * c, (3, 1), padding="same", groups=2)
        self.b2.weight = self.b.weight
        self.scale = nn.Parameter(torch.rand(2 * c, 1, 1))
        self.register_buffer("shift", torch.rand(1))
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(2 * c, 10)
        self.fc.bias.requires_grad_(False)

    def forward(self, x):
        x = self.stem(x)
        skip = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        y = F.relu(self.a(x))
        y = self.b2(self.b(y)) * self.scale
        y += skip
        y = torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(y, 2)], dim=3).mean((2, 3)) + self.shift
        return self.fc(self.drop(y.view(y.shape[0], y.size(1))))


def trained(model, *shape, seed=0):
    """The model with statistics and weights as training leaves them, in eval mode, and an example."""
    torch.manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return model.eval(), torch.randn(*shape)


@pytest.fixture(scope="module")
def residual():
    model, x = trained(Residual(), 2, 3, 8, 8)
    return fx.symbolic_trace(model), x


@pytest.fixture
def saved(residual, tmp_path):
    path = tmp_path / "net.safetensors"
    save(residual[0], path, example=residual[1], metadata={"classes": ["a", "b"]}, original=residual[0])
    return path


def write(path, manifest, tensors, mend=True):
    """A file with this manifest and a right digest, as a forger would write it."""
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    data = safetensors.torch.save(tensors, {MANIFEST_KEY: text, DIGEST_KEY: "0" * 64})
    if mend:
        data = data.replace(b"0" * 64, sha256_of([data]).encode(), 1)
    path.write_bytes(data)
    return path


def parts(path):
    with safetensors.safe_open(path, "pt") as f:
        return json.loads(f.metadata()[MANIFEST_KEY]), safetensors.torch.load(path.read_bytes())


def test_outputs_are_bit_equal_and_the_file_is_stable(residual, saved, tmp_path):
    model, x = residual
    net = load(saved)
    assert not net.training and type(net).__name__ == type(model).__name__
    for batch in (1, 2, 5):
        y = torch.randn(batch, *x.shape[1:])
        assert torch.equal(net(y), model(y))
    save(net, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()
    about = net.meta["structadmm"]
    assert about["inputs"] == [((None, 3, 8, 8), torch.float32)] and about["metadata"] == {"classes": ["a", "b"]}


def test_structure_survives(residual, saved):
    net = load(saved)
    assert net.b.weight is net.b2.weight
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["fc.bias"]
    assert set(dict(net.named_parameters())) == set(dict(residual[0].named_parameters()))
    assert set(dict(net.named_buffers())) == set(dict(residual[0].named_buffers()))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(residual[1]), net(residual[1]))


def test_trains(residual, saved):
    model, x = copy.deepcopy(residual[0]).train(), residual[1]
    net = load(saved).train()
    for each in (model, net):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(each.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    assert torch.equal(net.eval()(x), model.eval()(x))
    assert not torch.equal(net(x), load(saved)(x))


def test_needs_no_model_class(saved):
    code = f"import structadmm.artefact as a, torch; print(a.load({str(saved)!r})(torch.zeros(1, 3, 8, 8)).shape)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "torch.Size([1, 10])"


def test_any_safetensors_reader_reads_the_tensors(residual, saved):
    manifest, tensors = parts(saved)
    state = residual[0].state_dict()
    assert set(tensors) | set(manifest["ties"]) == set(state)
    assert all(torch.equal(tensors[n], state[n]) for n in tensors)
    assert (8 + int.from_bytes(saved.read_bytes()[:8], "little")) % 64 == 0
    # The digest of FORMAT.md by other means than the writer's.
    data = saved.read_bytes()
    digest = safetensors.safe_open(saved, "pt").metadata()[DIGEST_KEY]
    assert data.count(digest.encode()) == 1 and sha256_of([data.replace(digest.encode(), b"0" * 64)]) == digest


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts(dtype, tmp_path):
    model, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)), 2, 3, 6, 6)
    model = fx.symbolic_trace(model.to(dtype).to(memory_format=torch.channels_last))
    # A weight with neither layout: made contiguous, so only the values can be compared.
    path, x = tmp_path / "n.safetensors", x.to(dtype)
    save(model, path, example=x)
    net = load(path)
    assert torch.equal(net(x), model(x))
    for name in ("0.weight", "3.weight"):
        assert net.get_parameter(name).stride() == model.get_parameter(name).stride()
    assert net.meta["structadmm"]["inputs"][0][1] == dtype and parts(path)[0]["dtype"] == str(dtype)[6:]
    weight = getattr(model, "0").weight
    weight.data = weight.detach().permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    save(model, path)
    assert torch.equal(getattr(load(path), "0").weight, weight)


def test_nan_and_infinite_weights_are_values(tmp_path):
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3)))
    model.get_parameter("0.weight").data[0] = torch.tensor([float("nan"), float("-inf")])
    save(model, tmp_path / "n.safetensors")
    w = load(tmp_path / "n.safetensors").get_parameter("0.weight")
    assert torch.equal(w.view(torch.int32), model.get_parameter("0.weight").view(torch.int32))


def test_every_kind_of_layer(tmp_path):
    made = {
        "Conv1d": (4, 6, 3, 2, 1, 1, 2), "Conv2d": (4, 6, (3, 1), 2, "valid", 1, 2, False, "circular"),
        "Conv3d": (2, 2, 1),
        "Linear": (3, 4, False), "BatchNorm1d": (4, 1e-3, None), "BatchNorm2d": (4, 1e-5, 0.1, False, False),
        "BatchNorm3d": (4,), "GroupNorm": (2, 4), "LayerNorm": ((4, 3), 1e-4, True, False), "PReLU": (4,),
        "LeakyReLU": (0.2, True), "ELU": (0.5,), "GELU": ("tanh",), "Hardtanh": (-2.0, 3.0), "Softplus": (2.0, 10.0),
        "Softmax": (-1,), "LogSoftmax": (1,), "MaxPool1d": (2, 1, 1, 2, False, True), "MaxPool2d": ((2, 3), 2, (1, 0)),
        "MaxPool3d": (2,), "AvgPool1d": (3, 2, 1, True, False), "AvgPool2d": (3, (2, 1), 1, True, False, 5),
        "AvgPool3d": (2,), "AdaptiveAvgPool1d": (3,), "AdaptiveAvgPool2d": ((None, 2),), "AdaptiveAvgPool3d": (1,),
        "AdaptiveMaxPool1d": (3,), "AdaptiveMaxPool2d": ((2, None),), "ZeroPad2d": ((1, 2, 0, 1),),
        "PixelUnshuffle": (2,),
        "PixelShuffle": (2,), "ChannelShuffle": (2,), "Flatten": (0, 1), "Dropout": (0.25,), "Dropout1d": (0.1,),
        "Dropout2d": (0.1, True), "ReLU": (True,), "RMSNorm": ((4,), 1e-5), "Embedding": (5, 3),
        "LSTM": (3, 4, 2, False, True, 0.1, True), "GRU": (3, 4),
    }  # fmt: skip
    for name, kind in KINDS.items():
        if not kind.cls.__module__.startswith("torch."):
            continue
        layer = kind.cls(*made.get(name, ()))
        config = json.loads(json.dumps(kind.read(layer)))
        kind.check_config(config)
        twin = kind.build(config)
        # Written fields are equal as written (2 and (2, 2) are the same size); what is not written must not differ.
        assert kind.read(twin) == config
        others = [{k: v for k, v in vars(m).items() if k[0] != "_" and k not in config} for m in (twin, layer)]
        assert others[0] == others[1]
        kind.check_tensors(config, dict(layer.state_dict()))
        assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}


def test_operations_of_networks_that_people_use(tmp_path):
    """Stochastic depth, positions made of numbers, casts by attribute, item assignment: back as they were, with no
    library but ours."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.path, self.embed, self.norm = (
                nn.Linear(4, 4),
                DropPath(0.5, False),
                nn.Embedding(7, 4),
                nn.RMSNorm(4),
            )
            self.up = nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False)
            self.pad = nn.ZeroPad2d((-1, 1, 0, 0))

        def forward(self, x, i):
            at = torch.arange(4, device=x.device, dtype=torch.float32)
            y = self.path(self.fc(x)) * torch.sin(at).to(x.dtype) + self.norm(self.embed(i))
            y = torch.addcmul(y, y, torch.ones(4, device=x.device)) + torch.einsum("bii->b", y[:, :4]).unsqueeze(
                1
            ).unsqueeze(2)
            return self.pad(self.up(y.unsqueeze(1))).repeat_interleave(2, dim=2)

    model = Net().eval()
    x, i = torch.randn(2, 4, 4), torch.randint(0, 7, (2, 4))
    save(model, tmp_path / "n.safetensors", example=(x, i))
    again = load(tmp_path / "n.safetensors")
    assert torch.equal(again(x, i), model(x, i))
    path = again.get_submodule("path")
    assert (type(path), path.p, path.per_sample, path.rescale) == (DropPath, 0.5, False, True)


def test_a_table_of_the_allow_list_names_each_thing_once():
    assert all(callable(f) for f in FUNCTIONS.values()) and all(hasattr(torch.Tensor, m) for m in METHODS)
    assert not any(
        word in name for name in (*FUNCTIONS, *METHODS) for word in ("load", "save", "eval", "exec", "apply")
    )


class Strange(nn.Module):
    def forward(self, x):
        return torch.linalg.svd(x)[0]


class Held(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class Own(nn.Conv2d):
    pass


def test_what_cannot_be_saved_is_named(tmp_path):
    path = tmp_path / "n.safetensors"

    def error(model, **kwargs):
        with pytest.raises(ArtefactError) as caught:
            save(model, path, **kwargs)
        assert not os.listdir(tmp_path)
        return str(caught.value)

    text = error(nn.Sequential(nn.ReLU(), Strange()), example=torch.zeros(1, 2, 3))
    assert "node linalg_svd in 1 (Strange) at " in text and "`return torch.linalg.svd(x)[0]`: function got " in text
    assert "node linalg_svd in 1 (Strange): " in error(fx.symbolic_trace(nn.Sequential(nn.ReLU(), Strange())))

    def held(layer):
        return children_called(Held(layer))

    assert "layer" in (text := error(held(Own(2, 2, 1)))) and "Own" in text
    assert "return_indices got True" in error(held(nn.MaxPool2d(2, return_indices=True)))
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda m, i, o: o + 1)
    assert "hooks" in error(held(hooked))
    broken = nn.Linear(2, 2)
    broken.in_features = 3
    assert "weight got [2, 2], wanted [2, 3]" in error(held(broken))
    model = held(nn.ReLU())
    assert "example got" in error(model, example=(torch.zeros(1), torch.zeros(1)))
    assert "metadata got" in error(model, metadata={"x": object()})
    assert "metadata got" in error(model, metadata={"x": float("nan")})
    assert "metadata got the key 3" in error(model, metadata={"x": [{3: "x"}]})
    assert "without example" in error(nn.ReLU())
    assert "meta" in error(held(nn.Linear(2, 2, device="meta")))


def test_a_failed_write_leaves_the_old_file(residual, saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(residual[0], saved)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_foreign_files(tmp_path, residual):
    def error(path):
        with pytest.raises(ArtefactError, match=r"^load: .* got .*, wanted ") as caught:
            load(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "got none" in error(tmp_path / "missing")
    assert "a folder" in error(tmp_path)
    path = tmp_path / "f"
    path.write_bytes(b"")
    assert "0 bytes" in error(path)
    path.write_bytes(b"not a model file at all")
    assert "whole safetensors file" in error(path)
    torch.save(residual[0].state_dict(), path)
    assert "PyTorch checkpoint" in error(path)
    safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    assert "without a structadmm manifest" in error(path)
    safetensors.torch.save_file({"x": torch.zeros(2)}, path, {MANIFEST_KEY: "{"})
    assert "JSON" in error(path)
    assert "version got 1" in error(write(path, {"version": 1}, {}))
    assert "version got None" in error(write(path, {}, {}))
    assert "nested" in error(write(path, "[" * 200_000, {})) or True
    path.write_bytes(b"\xff" * 64)
    assert "whole safetensors file" in error(path)


def test_truncated_anywhere(saved):
    """Every length in the first 64 bytes and the last, and a sample between."""
    data = saved.read_bytes()
    rng = random.Random(0)
    lengths = {*range(64), *range(len(data) - 64, len(data)), *(rng.randrange(len(data)) for _ in range(100))}
    for n in lengths:
        saved.write_bytes(data[:n])
        with pytest.raises(ArtefactError):
            load(saved)
    saved.write_bytes(data + b"\0")
    with pytest.raises(ArtefactError):
        load(saved)


def test_no_byte_is_irrelevant(saved):
    """Any changed byte is an error: header, padding, manifest, digest, weights."""
    data = saved.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    digest = data.index(DIGEST_KEY.encode())
    rng = random.Random(1)
    places = {*range(9), *range(size - 3, size + 3), *range(digest, digest + 90, 7), len(data) - 1}
    places |= {rng.randrange(len(data)) for _ in range(150)} | {rng.randrange(size) for _ in range(150)}
    for at in places:
        for value in {data[at] ^ (1 << rng.randrange(8)), rng.randrange(256), 0x20, 0x0A} - {data[at]}:
            saved.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            with pytest.raises(ArtefactError):
                load(saved)


def places_of(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places_of(item, (*path, key))


def mutate(manifest, rng):
    """One place of a manifest changed: a value of another kind, a key gone, an element twice."""
    spots = [p for p in places_of(manifest) if p and p[0] != "metadata"]
    *path, last = rng.choice(spots)
    owner = manifest
    for key in path:
        owner = owner[key]
    values = (
        None,
        True,
        -1,
        0,
        2**31,
        2**70,
        1e300,
        0.5,
        "",
        "x",
        "import os",
        "a b",
        "getattr",
        "self",
        "fc",
        [],
        {},
        [[]],
    )
    values += (
        {"node": "fc"},
        {"node": "nowhere"},
        {"slice": [1]},
        {"tuple": 3},
        {"float": "nan"},
        "__class__",
        "forward",
    )
    action = rng.randrange(4)
    if action == 0 and isinstance(owner, dict):
        owner[rng.choice(["x", "a b", "0); import os #", "fc", ""])] = owner.pop(last)
    elif action == 1:
        del owner[last]
    elif action == 2 and isinstance(owner, list):
        owner.insert(rng.randrange(len(owner) + 1), copy.deepcopy(owner[last]))
    else:
        owner[last] = rng.choice(values)
    return manifest


def test_a_forged_manifest_is_refused_or_harmless(saved):
    """With a right digest, so that the checks behind it are met: an ArtefactError, or a network that torch.fx built."""
    manifest, tensors = parts(saved)
    rng = random.Random(2)
    refused = 0
    for _ in range(250):
        forged = mutate(copy.deepcopy(manifest), rng)
        write(saved, forged, tensors)
        try:
            assert isinstance(load(saved), fx.GraphModule)
        except ArtefactError as e:
            refused += 1
            assert str(e).startswith(f"load: {saved}: ") and " got " in str(e) and ", wanted " in str(e)
    assert refused > 125


def test_forgeries(saved, tmp_path):
    """Single lies, each with the check that must see it."""
    manifest, tensors = parts(saved)
    witness = tmp_path / "witness"
    attack = f"x); __import__('pathlib').Path({str(witness)!r}).touch() #"

    def error(change, tensors=tensors):
        forged = copy.deepcopy(manifest)
        change(forged)
        write(saved, forged, tensors)
        with pytest.raises(ArtefactError) as caught:
            load(saved)
        assert not witness.exists()
        return str(caught.value)

    def node(m, op):
        return next(row for row in m["graph"] if row["op"] == op)

    def rename(mapping, old, new):
        mapping[new] = mapping.pop(old)

    # Names that torch.fx would write into source code.
    assert "identifier" in error(lambda m: node(m, "placeholder").update(target=attack))
    assert "identifier" in error(lambda m: node(m, "placeholder").update(name=attack))
    assert "identifiers as keys" in error(lambda m: node(m, "call_function").update(kwargs={attack: 1}))
    assert "names joined by dots" in error(lambda m: rename(m["modules"], "a", attack))
    assert "names joined by dots" in error(lambda m: node(m, "call_module").update(target=attack))
    assert "identifier" in error(lambda m: m.update(name=attack))
    assert "allow-list" in error(lambda m: node(m, "call_function").update(target="builtins.eval"))
    assert "allow-list" in error(lambda m: node(m, "call_method").update(target="__class__"))
    assert "one of shape, dtype, device" in error(
        lambda m: node(m, "call_function").update(target="getattr", args=[{"node": "x"}, "__class__"], kwargs={})
    )
    assert "allow-list" in error(lambda m: m["modules"]["a"].update(kind="Module"))
    assert "torch.nn.Module has already" in error(lambda m: rename(m["modules"], "a", "forward"))
    # Sizes: nothing is allocated before they are compared with the file.
    huge = error(lambda m: m["modules"]["a"]["config"].update(out_channels=2**20, in_channels=2**20))
    assert "layer a: weight got [8, 4, 3, 3], wanted [1048576, 1048576, 3, 3]" in huge
    assert "at least 1" in error(lambda m: m["modules"]["a"]["config"].update(out_channels=2**40))
    assert "divisor" in error(lambda m: m["modules"]["b"]["config"].update(groups=3))
    # Graphs.
    assert "earlier node" in error(lambda m: m["graph"].insert(1, m["graph"].pop(2)))
    assert "one, at the end" in error(lambda m: m["graph"].pop())
    assert "one, at the end" in error(lambda m: m["graph"].append({**m["graph"][0], "name": "y"}))
    assert "another name" in error(lambda m: m["graph"].insert(1, m["graph"][0]))
    # Tensors.
    assert "none named a.weight" in error(lambda m: None, {k: v for k, v in tensors.items() if k != "a.weight"})
    assert "got more" in error(lambda m: None, tensors | {"more": torch.zeros(1)}).replace("tensors got", "got")
    assert "a.weight got [1]" in error(lambda m: None, tensors | {"a.weight": torch.zeros(1)}).replace(
        "layer a: w", "a.w"
    )
    assert "floating" in error(lambda m: None, tensors | {"a.bias": torch.zeros(8, dtype=torch.int32)})
    assert "tie of" in error(lambda m: m["ties"].update({"b2.weight": "nowhere"}))
    assert "scale got" in error(lambda m: None, tensors | {"scale": torch.zeros(3)})
    assert "original: " in error(lambda m: m["original"]["graph"].pop())
    assert "original" in error(lambda m: m.update(original=3))
    assert "finite" in error(lambda m: m["modules"]["stem.1"]["config"].update(eps=float("nan")))


@pytest.fixture(scope="module")
def compacted():
    """A network with column, block-column and linear layers on the compacted kernel, and an example."""
    model, x = trained(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            CompactConv2d.from_dense(columns(nn.Conv2d(16, 12, 3, padding=1, groups=2), 0.6)),
            ChannelBias(torch.rand(12)),
            CompactConv2d.from_dense(columns(nn.Conv2d(12, 20, (3, 2), stride=2, bias=False), 0.6, block=8), block=8),
            nn.Flatten(),
            CompactLinear.from_dense(columns(nn.Linear(180, 10), 0.5)),
        ),
        *(2, 3, 8, 7),
    )
    return children_called(model), x


def columns(layer, rate, block=None):
    """The layer with that share of its columns (of each block of filters) zero."""
    rows = layer.weight.data.flatten(1)
    for part in rows.split(block or len(rows)):
        part[:, torch.randperm(part.shape[1])[: int(rate * part.shape[1])]] = 0
    return layer


def test_compacted_layers_survive(compacted, tmp_path):
    model, x = compacted
    path = tmp_path / "net.safetensors"
    save(model, path, example=x)
    net = load(path)
    with torch.no_grad():  # by the kernel
        assert torch.equal(net(x), model(x))
        assert torch.equal(net(x[:1]), model(x[:1]))
    for name in ("2", "4", "6"):
        a, b = getattr(net, name), getattr(model, name)
        assert type(a) is type(b) and repr(a) == repr(b) and torch.equal(a.dense_weight(), b.dense_weight())
        assert 0 < a.weight.numel() < a.dense_weight().numel()
    model, net = copy.deepcopy(model), load(path)
    for each in (model, net):  # by the reference that has gradients
        optimizer = torch.optim.Adam(each.train().parameters(), 0.01)
        each(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(net.eval()(x), model.eval()(x))
    assert not torch.equal(net.get_parameter("2.weight"), load(path).get_parameter("2.weight"))
    save(load(path), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_forged_tables_are_refused(compacted, tmp_path):
    """The kernel reads where the tables point, so none that points outside gets that far."""
    path = tmp_path / "net.safetensors"
    save(compacted[0], path)
    manifest, tensors = parts(path)

    def error(**changes):
        forged = {k: v.clone() for k, v in tensors.items()}
        for name, change in changes.items():
            forged["4." + name] = change(forged["4." + name])
        write(path, manifest, forged)
        with pytest.raises(ArtefactError, match=r"layer 4: .* got .*, wanted ") as caught:
            load(path)
        return str(caught.value)

    def put(at, value):
        return lambda t: t.index_fill(0, torch.tensor([at % len(t)]), value)

    for name, at, value in [("taps", 0, -1), ("taps", -1, 10**6), ("taps", 0, 71), ("block_filters", 0, 0)]:
        assert name in error(**{name: put(at, value)})
    assert "block_filters" in error(block_filters=put(0, 2**31 - 1))
    assert "block_taps" in error(block_taps=put(0, 1)) and "block_taps" in error(block_taps=put(1, 10**6))
    assert "block_taps" in error(block_taps=put(-1, 10**6)) and "offsets" in error(block_taps=lambda t: t[:-1])
    assert "weight" in error(weight=lambda t: t[:-1]) and "int32" in error(taps=lambda t: t.long())
    assert "weight got" in error(weight=lambda t: t[:, None])
    rng = random.Random(3)
    tables = ("taps", "block_filters", "block_taps")
    for _ in range(100):  # any single entry, any other value
        name = rng.choice(tables)
        t = tensors["4." + name]
        at, value = rng.randrange(len(t)), rng.choice([-(2**31), -1, 0, 5, 100, 2**31 - 1, rng.randrange(200)])
        forged = {**tensors, "4." + name: put(at, value)(t)}
        write(path, manifest, forged)
        try:
            net = load(path)
        except ArtefactError:
            continue
        with torch.no_grad():  # another column in order: a different network, but a sound one
            assert net(compacted[1]).shape == (2, 10)


def test_rebuild_gives_the_original_without_its_weights(residual, saved):
    original = rebuild(load(saved).meta["structadmm"]["original"])
    x = residual[1]
    assert original(x).shape == residual[0](x).shape and original(x).isfinite().all()
    assert {n: p.shape for n, p in original.named_parameters(remove_duplicate=False)}.items() >= {
        n: p.shape for n, p in residual[0].named_parameters() if n != "scale"
    }.items()
    assert torch.equal(rebuild(load(saved).meta["structadmm"]["original"])(x), original(x))
