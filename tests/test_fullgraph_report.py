# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What is compiled is reported, and UNSLOTH_PATCHES_FULLGRAPH=strict enforces full graphs.

Without a GPU, blocks are compiled with aot_eager, and PyTorch formulas stand in for the Triton
operators that can be traced for CUDA tensors only (RMSNorm, RoPE, SwiGLU).
"""

import gc
import json
import logging
import os
import sys
from types import SimpleNamespace

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")

import unsloth  # noqa: F401, E402
import pytest  # noqa: E402

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason = "needs a CUDA GPU")
MODE = "UNSLOTH_PATCHES_FULLGRAPH"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --- what stands in for a GPU ---------------------------------------------------------------------


@pytest.fixture(autouse = True)
def fresh_dynamo(monkeypatch):
    """No graph, no counter and no mode of an earlier test."""
    from torch._dynamo.utils import counters

    monkeypatch.delenv(MODE, raising = False)
    monkeypatch.delenv("UNSLOTH_COMPILE_REPORT", raising = False)
    # pytest listens to every logger, and torch then formats each graph for its structured trace.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def aot_eager(monkeypatch):
    """torch.compile without Inductor: graphs are traced and differentiated, and run bit for bit."""
    compile_ = torch.compile
    allowed = ("fullgraph", "dynamic", "isolate_recompiles", "recompile_limit")

    def without_inductor(function, *args, **options):
        kept = {name: value for name, value in options.items() if name in allowed}
        return compile_(function, backend = "aot_eager", **kept)

    monkeypatch.setattr(torch, "compile", without_inductor)


class Block(torch.nn.Module):
    """A decoder layer of two linears; `between` runs between them."""

    def __init__(self, width = 8):
        super().__init__()
        self.up = torch.nn.Linear(width, 2 * width)
        self.down = torch.nn.Linear(2 * width, width)
        self.between = torch.nn.functional.silu

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.down(self.between(self.up(hidden_states)))


class Toy(torch.nn.Module):
    def __init__(
        self,
        block = Block,
        layers = 2,
    ):
        super().__init__()
        self.config = SimpleNamespace(model_type = "toy", num_hidden_layers = layers)
        self.embed = torch.nn.Embedding(16, 8)
        self.layers = torch.nn.ModuleList(block() for _ in range(layers))
        self.head = torch.nn.Linear(8, 16)

    def forward(
        self,
        input_ids,
        labels = None,
        block_arguments = None,
        **kwargs,
    ):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, **(block_arguments or {}))
        logits = self.head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(loss = loss, logits = logits)


def breaking(hidden):
    torch._dynamo.graph_break()
    return torch.nn.functional.silu(hidden)


BREAK_LINE = breaking.__code__.co_firstlineno + 1


@pytest.fixture
def toy(aot_eager, monkeypatch):
    """toy(mode, between = None) -> a model whose blocks went through Unsloth's block compile."""

    def make(mode = "auto", between = None):
        from unsloth.models import _block_compile

        monkeypatch.setenv(MODE, mode)
        block = type("ToyDecoderLayer", (Block,), {"forward": Block.forward})
        torch.manual_seed(0)
        model = Toy(block).train()
        for layer in model.layers:
            layer.between = between or layer.between
        _block_compile._wrap(block, {})
        return model

    return make


def batch(
    length = 5,
    rows = 2,
    seed = 0,
):
    make = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 16, (rows, length), generator = make)
    return {"input_ids": tokens, "labels": tokens}


# --- modes and bad input --------------------------------------------------------------------------


def test_an_unknown_mode_names_the_value_and_the_choices(monkeypatch):
    """Also an unknown value of the report's own switch; upper case and blanks are forgiven."""
    from unsloth.models.compile_callback import report_switch
    from unsloth.models.compile_modes import fullgraph_mode

    assert fullgraph_mode() == "auto"
    monkeypatch.setenv(MODE, " Strict ")
    assert fullgraph_mode() == "strict"
    monkeypatch.setenv(MODE, "full")
    with pytest.raises(ValueError, match = "PATCHES_FULLGRAPH='full'.*auto, strict, off"):
        fullgraph_mode()
    monkeypatch.setenv("UNSLOTH_COMPILE_REPORT", "yes")
    with pytest.raises(ValueError, match = "COMPILE_REPORT='yes'.*1, 0, probe"):
        report_switch()


def test_an_unknown_mode_does_not_cost_a_model_its_compiled_blocks(toy, capsys):
    """Blocks are set up as with auto and the value is told; the trainer refuses it (see below)."""
    model = toy("full")
    assert "'full': choose one of auto, strict, off" in capsys.readouterr().out
    model(**batch()).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_off_is_upstream_alone(toy):
    """No region is watched."""
    from unsloth.models.compile_modes import regions_of

    model = toy("off")
    model(**batch())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert regions_of(model) == []


def test_a_report_without_training_is_an_error_or_says_so():
    """Before it was entered: RuntimeError. Entered, but no step: the table says it."""
    from unsloth.models.compile_report import CompileReport

    report = CompileReport()
    with pytest.raises(RuntimeError, match = "nothing was recorded; use it as a context manager"):
        report.summary()
    with report:
        pass
    assert "no training step was recorded" in report.table()
    with pytest.raises(RuntimeError, match = "make a new one"):
        report.__enter__()
    with pytest.raises(ValueError, match = r"needs CompileReport\(model\)"):
        report.compare_with_eager(batch())


# --- collecting -----------------------------------------------------------------------------------


def test_more_compilations_than_dynamo_keeps_are_all_counted():
    """Dynamo keeps 64 entries; what was there before is not counted, and its limit comes back."""
    from torch._dynamo import utils
    from unsloth.models.compile_events import CompileEvents

    def compiled(seed):
        source = f"def f(x):\n    return x * {seed} + 1\n"
        names = {}
        exec(source, names)
        return torch.compile(names["f"], backend = "eager")

    compiled(-1)(torch.ones(2))
    limit = utils._compilation_metrics.maxlen
    events = CompileEvents()
    events.start()
    for seed in range(70):
        compiled(seed)(torch.ones(2))
    events.stop()
    assert len(events.compilations) == events.graphs == 70
    assert utils._compilation_metrics.maxlen == limit
    assert events.seconds() > 0


def test_breaks_have_file_and_line_and_recompilations_their_reason():
    """From torch's silenced logs: nothing is printed, and their levels are as before."""
    from unsloth.models.compile_events import CompileEvents
    from unsloth.models.compile_logs import Place

    loggers = [
        logging.getLogger(f"torch._dynamo.{name}.__graph_breaks")
        for name in ("symbolic_convert", "convert_frame")
    ]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    events = CompileEvents()
    events.start()
    function = torch.compile(breaking, backend = "eager", dynamic = False)
    function(torch.ones(3))
    function(torch.ones(4))
    events.stop()
    assert before == [(logger.level, logger.propagate, logger.handlers) for logger in loggers]
    places = {entry.place: count for entry, count in events.breaks.items()}
    assert places == {Place(__file__, BREAK_LINE): events.break_count}
    assert events.break_count == torch._dynamo.utils.counters["graph_break"].total() > 0
    assert all("graph_break" in entry.reason for entry in events.breaks)
    assert any("size mismatch" in c.recompile_reason for c in events.recompilations)


def test_a_recompilation_names_the_guard_that_matters():
    """Not the one that tells the other gradient mode's graph apart, which is compared first."""
    from unsloth.models.compile_events import CompileEvents

    function = torch.compile(lambda x: x.sin() + 1, backend = "eager", dynamic = False)
    logger = logging.getLogger("torch._dynamo.guards.__recompiles")
    before = (logger.level, logger.propagate, list(logger.handlers))
    events = CompileEvents()
    events.start()
    for length in (3, 4):
        with torch.no_grad():
            function(torch.ones(length))
        function(torch.ones(length))
    events.stop()
    reasons = [c.recompile_reason for c in events.recompilations]
    assert len(reasons) == 3 and "grad_mode" in reasons[0]
    assert all("size mismatch" in r and "grad_mode" not in r for r in reasons[1:])
    assert before == (logger.level, logger.propagate, logger.handlers)
    assert "recompiles" not in torch._logging._internal.log_state.artifact_names


def test_a_reset_of_dynamos_counters_does_not_lose_breaks():
    """Someone else's counters.clear() in the middle of training."""
    from unsloth.models.compile_events import CompileEvents

    torch.compile(lambda x: x + 1, backend = "eager")(torch.ones(1))
    events = CompileEvents()
    events.start()
    torch.compile(breaking, backend = "eager")(torch.ones(3))
    events.drain()
    torch._dynamo.utils.counters.clear()
    torch.compile(lambda x: x + 2, backend = "eager")(torch.ones(1))
    events.stop()
    assert events.break_count == 1 and events.graphs == 2


# --- regions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_a_block_without_breaks_is_one_graph_with_the_eager_loss(toy, mode):
    """All layers and lengths share graphs; losses are bit-equal; evaluation is not counted."""
    from unsloth.models.compile_report import CompileReport

    model = toy(mode)
    with CompileReport(model) as report:
        for length in (5, 7, 9, 12):
            model(**batch(length)).loss.backward()
            report.step(tokens = 2 * length)
        model.eval()
        model(**batch())
        gap = report.compare_with_eager(batch(7))
    assert not any(module.training for module in model.modules())
    found = report.summary()
    (region,) = found["regions"]
    assert found["graph_breaks"] == 0 and found["graphs"] == 1 and found["recompilations"] == 0
    assert region["layers"] == {"compiled": 2} and region["fullgraph"] == (mode == "strict")
    assert region["compiled_calls"] == 8 and gap["relative_difference"] == 0.0
    assert region["uncompiled_calls"] == {}
    assert "0 graph breaks" in report.table()


def test_auto_reports_a_break_with_its_line_and_trains_on(toy):
    """The negative control: a break put back into the block changes no loss, but is told."""
    from unsloth.models.compile_report import CompileReport

    wanted = toy("auto")(**batch()).loss
    model = toy("auto", between = breaking)
    with CompileReport(model) as report:
        loss = model(**batch()).loss
        loss.backward()
        report.step()
    assert torch.equal(loss, wanted)
    found = report.summary()
    assert found["graph_breaks"] >= 1 and found["graphs"] >= 2
    here = f"test_fullgraph_report.py:{BREAK_LINE}"
    assert any(entry["where"].endswith(here) for entry in found["breaks"])
    assert f"test_fullgraph_report.py:{BREAK_LINE}" in report.table()


def test_strict_stops_at_a_break_with_line_and_remedy(toy):
    """Before any weight changed: the first forward raises."""
    from unsloth.models.compile_modes import FullgraphError

    model = toy("strict", between = breaking)
    with pytest.raises(FullgraphError) as caught:
        model(**batch())
    told = str(caught.value)
    assert f"test_fullgraph_report.py:{BREAK_LINE}" in told
    assert "remedy" in told and "custom_op" in told and "FULLGRAPH=auto" in told


def failing_backend(graph, inputs):
    raise RuntimeError("no code for this device")


def test_auto_reports_a_demotion_with_its_reason_and_strict_refuses_it(toy, monkeypatch):
    """A backend that fails: upstream keeps the stock forward."""
    from unsloth.models.compile_modes import FullgraphError
    from unsloth.models.compile_report import CompileReport

    monkeypatch.setattr(
        torch, "compile", lambda function, **kw: torch._dynamo.optimize(failing_backend)(function)
    )
    model = toy("auto")
    with CompileReport(model) as report:
        model(**batch()).loss.backward()
        report.step()
    (region,) = report.summary()["regions"]
    assert region["layers"] == {"eager": 2} and region["compiled_calls"] == 0
    ((reason, count),) = region["uncompiled_calls"].items()
    assert reason.startswith("demoted") and "no code for this device" in reason and count == 2
    assert "no code for this device" in report.table()
    with pytest.raises(FullgraphError, match = "no code for this device"):
        toy("strict")(**batch())


def test_calls_around_the_region_are_counted_by_reason(toy, monkeypatch):
    """Switched off after loading: told in auto, refused in strict."""
    from unsloth.models.compile_modes import FullgraphError
    from unsloth.models.compile_report import CompileReport

    model, strict = toy("auto"), toy("strict")
    monkeypatch.setenv("UNSLOTH_BLOCK_COMPILE", "0")
    with CompileReport(model) as report:
        model(**batch())
        with pytest.raises(ValueError, match = "no block ran compiled"):
            report.compare_with_eager(batch())
    (region,) = report.summary()["regions"]
    assert region["uncompiled_calls"] == {"switched off by UNSLOTH_BLOCK_COMPILE=0": 2}
    with pytest.raises(FullgraphError, match = "switched off by UNSLOTH_BLOCK_COMPILE=0"):
        strict(**batch())


# --- the trainer ----------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path):
    """train(model, **settings) -> the Trainer after three steps, patched as Unsloth does it."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator
    from unsloth.trainer import _backwards_compatible_trainer

    samples = [batch(7, 1, seed) for seed in range(8)]
    rows = Dataset.from_list([{k: v[0].tolist() for k, v in one.items()} for one in samples])

    def run(model, **settings):
        subclass = type("ToySFTTrainer", (Trainer,), {})
        subclass.__init__ = _backwards_compatible_trainer(subclass, TrainingArguments)
        given = {"output_dir": str(tmp_path / "out"), "max_steps": 3, "report_to": "none"}
        given.update(per_device_train_batch_size = 2, save_strategy = "no", use_cpu = True)
        given.update(remove_unused_columns = False, disable_tqdm = True, **settings)
        trainer = subclass(
            model = model,
            args = TrainingArguments(**given),
            train_dataset = rows,
            data_collator = default_data_collator,
        )
        trainer.train()
        return trainer

    return run


def reports_of(trainer):
    from unsloth.models.compile_callback import CompileReportCallback

    return sum(isinstance(c, CompileReportCallback) for c in trainer.callback_handler.callbacks)


def test_the_trainer_reports_once_and_saves_json(toy, train, tmp_path, capsys, monkeypatch):
    """Added by itself; one table; compile_report.json in output_dir; with probe, the eager loss."""
    monkeypatch.setenv("UNSLOTH_COMPILE_REPORT", "probe")
    trainer = train(toy("strict"))
    out = capsys.readouterr().out
    assert reports_of(trainer) == 1 and out.count("Unsloth: what was compiled") == 1
    assert "2 compiled" in out and "0 graph breaks" in out and "tokens/s" in out
    (found,) = json.loads((tmp_path / "out" / "compile_report.json").read_text())["ranks"]
    assert found["mode"] == "strict" and found["graphs"] >= 1 and found["graph_breaks"] == 0
    assert found["speed"]["steps"] == 3 and found["speed"]["tokens_per_second"] > 0
    assert found["speed"]["tokens"] == 14 * found["speed"]["warm_steps"]
    assert found["eager_loss"]["relative_difference"] == 0.0
    assert not trainer.model._forward_pre_hooks


@pytest.mark.parametrize("name, value", [(MODE, "off"), ("UNSLOTH_COMPILE_REPORT", "0")])
def test_the_report_can_be_switched_off(toy, train, capsys, tmp_path, monkeypatch, name, value):
    """No callback, no table, no file."""
    model = toy("auto")
    monkeypatch.setenv(name, value)
    trainer = train(model)
    assert reports_of(trainer) == 0 and "what was compiled" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "compile_report.json").exists()


def test_the_trainer_refuses_an_unknown_mode(toy, train, monkeypatch):
    """Before a trainer is built: ValueError with the value and the choices."""
    model = toy("auto")
    monkeypatch.setenv(MODE, "everything")
    with pytest.raises(ValueError, match = "'everything': choose one of auto, strict, off"):
        train(model)


def test_strict_stops_before_any_weight_changes(toy, train, monkeypatch):
    """A break; blocks that nobody set up for compiling; a mode that was set too late."""
    from unsloth.models.compile_modes import FullgraphError

    model = toy("strict", between = breaking)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FullgraphError, match = f"test_fullgraph_report.py:{BREAK_LINE}"):
        train(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(FullgraphError, match = "no decoder block of this model is set up"):
        train(Toy())
    late = toy("auto")
    monkeypatch.setenv(MODE, "strict")
    with pytest.raises(FullgraphError, match = "set it before the model is loaded"):
        train(late)


def test_a_folder_that_cannot_be_written_is_told(toy, train, capsys, tmp_path):
    """output_dir is a file: no JSON, a message with the path; the table is there."""
    folder = tmp_path / "taken"
    folder.write_text("a file")
    from unsloth.models.compile_report import CompileReport

    with CompileReport() as report:
        pass
    with pytest.raises(OSError, match = "cannot be written to .*taken.*make output_dir writable"):
        report.save(folder)
    trainer = train(toy("auto"))
    capsys.readouterr()
    from unsloth.models import compile_callback

    compile_callback._tell([report.summary()], str(folder))
    out = capsys.readouterr().out
    assert "what was compiled" in out and "make output_dir writable" in out
    assert trainer.state.global_step == 3


def test_a_fault_of_the_report_never_ends_training(toy, train, capsys, monkeypatch):
    """Whatever fails inside it is told in one line, once."""
    from unsloth.models import compile_events

    def fault(*args, **kwargs):
        raise KeyError("ours")

    monkeypatch.setattr(compile_events.CompileEvents, "drain", fault)
    trainer = train(toy("auto"))
    out = capsys.readouterr().out
    assert trainer.state.global_step == 3 and not trainer.model._forward_pre_hooks
    assert out.count("compile report stopped (KeyError") == 1 and "what was compiled" not in out


def test_every_rank_counts_and_the_first_prints(monkeypatch):
    """All ranks' summaries go into the file; the table names the ranks that differ or have none."""
    import torch.distributed as dist
    from unsloth.models import compile_callback
    from unsloth.models.compile_report import CompileReport
    from unsloth.models.compile_table import table

    with CompileReport() as report:
        pass
    mine = report.summary()
    other = {**mine, "graphs": 9, "graph_breaks": 2}

    def gather(into, value):
        into[:] = [value, other, {"error": "KeyError: 'ours'"}]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    told = table(compile_callback._of_all_ranks(mine))
    assert "rank 1 differs" in told and "9 graphs, 2 graph breaks" in told
    assert "rank 2" in told and "no report: KeyError" in told


# --- Unsloth's fast path --------------------------------------------------------------------------


def rms_norm(
    layernorm,
    X,
    gemma = False,
    save_output = False,
    reuse_grad = False,
):
    variance = X.float().square().mean(-1, keepdim = True)
    normed = X.float() * torch.rsqrt(variance + layernorm.variance_epsilon)
    return normed.to(X.dtype) * layernorm.weight


def rope(
    Q,
    K,
    cos,
    sin,
    rope_embedding_indices = None,
):
    def rotated(x):
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * cos[: x.shape[2]] + turned * sin[: x.shape[2]]

    return rotated(Q).to(Q.dtype), rotated(K).to(K.dtype)


def swiglu(e, g):
    return torch.nn.functional.silu(e.float()).to(e.dtype) * g


def one_device(self, index):
    """RoPE tables of the only device, which on a CPU has no index."""
    rows, dtype = self._rope_cache_rows(), self._rope_cache_dtype
    self._set_cos_sin_cache(seq_len = rows, device = torch.device("cpu"), dtype = dtype)
    self._rope_cache_versions[index] = self._rope_cache_version


@pytest.fixture
def fast_path(monkeypatch, aot_eager):
    """Unsloth's loader and fast forwards on a CPU."""
    from unsloth.kernels import fast_lora, qk_norm_rope
    from unsloth.models import _block_compile, llama, loader, mistral, qwen3

    device = SimpleNamespace(major = 8, minor = 0, total_memory = 1 << 36, name = "CPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *a: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (8, 0))
    monkeypatch.setattr(gc, "collect", lambda *a: 0)  # the loader's eleven take half of the time
    monkeypatch.setattr(loader, "ALLOW_BITSANDBYTES", True)
    monkeypatch.setattr(llama, "get_current_device", lambda: None)
    monkeypatch.setattr(llama._PerDeviceRopeCache, "_build_rope_cache", one_device)
    monkeypatch.setattr(fast_lora, "swiglu_fg_kernel", swiglu)
    dequantize = sys.modules.get("unsloth.kernels.nf4_dequantize")
    if dequantize is not None:  # its PyTorch formula: the interpreter takes seconds a model
        monkeypatch.setattr(dequantize, "INTERPRETED", False)
    for module in (llama, mistral, qwen3, qk_norm_rope):
        for name, formula in (("fast_rms_layernorm", rms_norm), ("fast_rope_embedding", rope)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, formula)
    stock = _block_compile.patch_block_compile

    def with_a_device(model):
        with monkeypatch.context() as inner:
            inner.setattr(torch.cuda, "is_available", lambda: True)
            return stock(model)

    monkeypatch.setattr(_block_compile, "patch_block_compile", with_a_device)


FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
}


def save_checkpoint(folder, family, **sizes):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    name, more = FAMILIES[family]
    given = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    config = getattr(transformers, f"{name}Config")(**{**given, **more, **sizes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.to(torch.float16).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token = "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object = tokenizer, **special)
    fast.save_pretrained(folder)


def lora_model(
    folder,
    four_bit,
    dtype = torch.float16,
    checkpointing = False,
):
    """FastLanguageModel with LoRA, its B factors random so that every path has a gradient."""
    from unsloth import FastLanguageModel

    on_cpu = {"device_map": "cpu"} if DEVICE == "cpu" else {}
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length = 128, load_in_4bit = four_bit, dtype = dtype, **on_cpu
    )
    for module in model.modules() if DEVICE == "cpu" else ():
        if hasattr(module, "multi_gpu_cos_cached"):
            module.multi_gpu_cos_cached, module.multi_gpu_sin_cached = {None: None}, {None: None}
            module._rope_cache_versions, module._rope_rows_ready = {None: None}, {None: 0}
            module._rope_rebuild_for_grad = {None: False}
    model = FastLanguageModel.get_peft_model(
        model,
        r = 4,
        lora_alpha = 8,
        target_modules = LINEARS,
        use_gradient_checkpointing = checkpointing,
        random_state = 1,
    )
    make = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator = make) * 0.02)
    return model.train()


@pytest.mark.parametrize("four_bit", [False, True], ids = ["16bit", "4bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_blocks_of_a_family_are_whole_graphs_in_strict_mode(
    family, four_bit, fast_path, tmp_path, monkeypatch
):
    """No break, no demotion, no recompilation over two lengths, and losses bit-equal to eager."""
    if DEVICE == "cuda":
        pytest.skip("with Inductor and the real kernels: see the test for GPUs")
    from unsloth.models.compile_report import CompileReport, blocks_uncompiled

    def loss_of(length):
        given = batch(length)
        logits = model(input_ids = given["input_ids"]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), given["labels"].flatten())

    monkeypatch.setenv(MODE, "strict")
    save_checkpoint(tmp_path, family)
    model = lora_model(tmp_path, four_bit)
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("Linear4bit" in kinds) == four_bit
    with CompileReport(model) as report:
        loss = loss_of(9)
        loss.backward()
        report.step(tokens = 18)
        loss_of(12)
        report.step(tokens = 24)
    with blocks_uncompiled(model):
        assert torch.equal(loss_of(9), loss)
    found = report.summary()
    (region,) = found["regions"]
    assert region["layers"] == {"compiled": 2} and region["compiled_calls"] == 4
    assert region["uncompiled_calls"] == {} and found["failed"] == []
    assert (found["graphs"], found["graph_breaks"], found["recompilations"]) == (1, 0, 0)
    trained = [p.grad for name, p in model.named_parameters() if p.requires_grad]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in trained)


@on_gpu
@pytest.mark.parametrize(
    "family, four_bit", [("llama", True), ("mistral", False), ("qwen2", False), ("qwen3", True)]
)
def test_on_the_gpu_a_family_trains_in_whole_graphs_in_strict_mode(
    family, four_bit, tmp_path, monkeypatch
):
    """Inductor, the real kernels, Unsloth's checkpointing; losses within bf16's noise of eager."""
    from unsloth.models.compile_report import CompileReport

    monkeypatch.setenv(MODE, "strict")
    save_checkpoint(tmp_path, family, hidden_size = 128, intermediate_size = 256, head_dim = 32)
    checkpointing = "unsloth" if family == "llama" else False  # it doubles the graphs
    model = lora_model(tmp_path, four_bit, torch.bfloat16, checkpointing = checkpointing)
    on_device = lambda length: {name: part.cuda() for name, part in batch(length).items()}
    with CompileReport(model) as report:
        for length in (33, 57):
            model(**on_device(length)).loss.backward()
            report.step(tokens = 2 * length)
        gap = report.compare_with_eager(on_device(57))
    found = report.summary()
    print(report.table())
    (region,) = found["regions"]
    assert region["layers"] == {"compiled": 2} and region["uncompiled_calls"] == {}
    assert found["graph_breaks"] == 0 and found["failed"] == []
    # At most one a length and gradient mode, and one for dynamic lengths.
    assert found["graphs"] <= 6 and found["memory"]["allocated"] > 0
    assert gap["relative_difference"] < 2**-8
    trained = [p.grad for name, p in model.named_parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in trained)


@on_gpu
def test_on_the_gpu_the_sft_trainer_adds_the_report_by_itself():
    """Unsloth's trl.SFTTrainer, as it is after import."""
    import trl

    names, function = [], trl.SFTTrainer.__init__
    while function is not None:
        names.append(function.__code__.co_name)
        function = getattr(function, "__wrapped__", None)
    assert names.count("reporting_init") == 1
