"""The sample at the end of a run, and scripts/generate.py: what they continue, that seeds decide, what is refused."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.jobs import tiny_job
from transformers_backend import Trainer
from transformers_backend.generate import continue_tokens, encode_prompt, load_generator, main
from transformers_backend.model import HFTransformerModel
from transformers_backend.sample import sample_text

SCRIPT = Path(__file__).parents[3] / "scripts" / "generate.py"

CONFIG = LlamaConfig(
    vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, attention_dropout=0.5,
)  # fmt: skip


@pytest.fixture
def model() -> HFTransformerModel:
    torch.manual_seed(0)
    return HFTransformerModel.wrap(LlamaForCausalLM(CONFIG).train())


def _says(model: HFTransformerModel, text: str) -> None:
    """Make a model that says `text` after anything: each byte is followed by the next one of it."""
    hf_model = model.hf_model
    with torch.no_grad():
        for parameter in hf_model.model.layers.parameters():
            parameter.zero_()  # the residual stream is the embedding alone
        hf_model.model.embed_tokens.weight.zero_()
        hf_model.lm_head.weight.zero_()
        for place, (here, there) in enumerate(itertools.pairwise(text)):
            hf_model.model.embed_tokens.weight[ord(here) + 3, place] = 1.0
            hf_model.lm_head.weight[ord(there) + 3, place] = 100.0


def test_the_prompt_is_continued(model: HFTransformerModel):
    _says(model, "abcdefghij")
    assert sample_text(model, ByT5Tokenizer(), "abc", new_tokens=5) == "abcdefgh"
    assert sample_text(model, ByT5Tokenizer(), "d", new_tokens=1) == "de"


def test_it_ends_with_the_end_token(model: HFTransformerModel):
    _says(model, "abc")
    eos = ByT5Tokenizer().eos_token_id
    with torch.no_grad():
        model.hf_model.model.embed_tokens.weight[ord("c") + 3, 31] = 1.0
        model.hf_model.lm_head.weight[eos, 31] = 100.0
    assert sample_text(model, ByT5Tokenizer(), "a", new_tokens=20) == "abc"


def test_the_seed_decides_and_nothing_else_changes(model: HFTransformerModel):
    state, weights = torch.get_rng_state(), model.full_state_dict()
    model.hf_model.train()
    texts = [sample_text(model, ByT5Tokenizer(), "x", new_tokens=12, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state), "a resumed run must not depend on whether it sampled"
    assert model.hf_model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.full_state_dict().items())
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())


def test_temperature(model: HFTransformerModel):
    greedy = {sample_text(model, ByT5Tokenizer(), "x", new_tokens=8, seed=s, temperature=1e-4) for s in range(3)}
    assert len(greedy) == 1, "near zero the most likely token is always taken"
    logits = model.hf_model.eval()(input_ids=torch.tensor([[ord("x") + 3]])).logits[0, -1]
    first = int(logits.argmax())
    assert sample_text(model, ByT5Tokenizer(), "x", new_tokens=1, temperature=1e-4) == ByT5Tokenizer().decode(
        [ord("x") + 3, first]
    )


# -- the command ------------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<me>' }}{% endif %}"
)


@pytest.fixture
def folder(model: HFTransformerModel, tmp_path: Path) -> Path:
    """An exported model that says the alphabet, with a tokenizer that has a chat template."""
    _says(model, "abcdefghijklm")
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    model.save_pretrained(tmp_path / "exported", tokenizer=tokenizer)
    return tmp_path / "exported"


def test_an_exported_folder_is_continued(folder: Path, capsys: pytest.CaptureFixture[str]):
    greedy = ["--max_new_tokens", "5", "--temperature", "0"]
    assert main([str(folder), "--prompt", "abc", "--prompt", "d", *greedy]) == 0
    assert capsys.readouterr().out == "abcdefgh\n\ndefghi\n"
    assert main([str(folder), "--prompt", "abc", "--max_new_tokens", "2", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == "abcde\n", "every other token has next to no probability"


def test_a_chat(folder: Path, capsys: pytest.CaptureFixture[str]):
    tokens = encode_prompt(AutoTokenizer.from_pretrained(folder), "hi", chat=True)
    assert ByT5Tokenizer().decode(tokens) == "<user>hi<me>"
    assert main([str(folder), "--prompt", "hi", "--chat", "--max_new_tokens", "3", "--temperature", "0"]) == 0
    answer = capsys.readouterr().out
    assert "hi" not in answer, "the answer alone"


def test_it_stops_at_the_end_token_of_the_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]):
    """A model from scratch has its architecture's default id in its config (Llama's 2), which ends nothing here."""
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][ord("m") + 3, 31] = 1.0
    weights["lm_head.weight"][ByT5Tokenizer().eos_token_id, 31] = 100.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert main([str(folder), "--prompt", "k", "--max_new_tokens", "20", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "klm\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint and its export."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    changes = {"training__steps": 2, "checkpoint__enable": True, "checkpoint__last_save_in_hf": True}
    trainer = Trainer(tiny_job(folder, "run", **changes))
    try:
        trainer.train()
        torch.save(trainer.model.full_state_dict(), folder / "weights.pt")
    finally:
        trainer.close()
    return folder / "run"


def test_a_checkpoint_is_loaded_bit_by_bit(run: Path):
    model, tokenizer = load_generator(str(run))
    expected = torch.load(run.parent / "weights.pt")
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    plain = LlamaForCausalLM.from_pretrained(run / "checkpoint" / "step-2-hf")
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    input_ids = torch.tensor([tokenizer("the quick").input_ids])
    assert torch.equal(model(input_ids).logits, plain(input_ids).logits)
    half, _ = load_generator(str(run), dtype=torch.bfloat16)
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in half.state_dict().items())


def test_a_checkpoint_and_its_export_say_the_same(run: Path, capsys: pytest.CaptureFixture[str]):
    texts = {}
    sources = (run, run / "checkpoint" / "step-2", run / "checkpoint" / "step-2-hf")
    for source, seed in itertools.product(sources, ("1", "2")):
        assert main([str(source), "--prompt", "the ", "--max_new_tokens", "12", "--seed", seed]) == 0
        texts.setdefault(seed, set()).add(capsys.readouterr().out)
    assert all(len(found) == 1 for found in texts.values())
    assert texts["1"] != texts["2"], "the seed decides"
    (text,) = texts["1"]
    assert text.startswith("the ")


def test_the_script(run: Path):
    arguments = ["--prompt", "the ", "--max_new_tokens", "3", "--temperature", "0"]
    ran = subprocess.run(
        [sys.executable, SCRIPT, run, *arguments], capture_output=True, text=True, check=False, timeout=240
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("the ")


def test_top_p(folder: Path):
    model, tokenizer = load_generator(str(folder))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, 0] = -torch.arange(384) / 1000  # after "a" every token is a little less likely

    def texts(top_p: float) -> str:
        options = {"max_new_tokens": 1, "temperature": 1.0, "top_p": top_p, "whole": False}
        return "".join(continue_tokens(model, tokenizer, [ord("a") + 3], seed=seed, **options) for seed in range(40))

    assert any(character.isalpha() for character in texts(1.0)), "all tokens, not Transformers' fifty likeliest"
    assert not any(character.isalpha() for character in texts(0.1))


# -- what is refused


def _refusal(capsys: pytest.CaptureFixture[str], source: object, *arguments: str, prompt: str = "abc") -> str:
    assert main([str(source), "--prompt", prompt, *arguments]) == 2
    # Before it there may be Transformers' progress bar, which other tests of this process switch on.
    before, is_there, message = capsys.readouterr().err.partition("error: ")
    assert is_there
    assert "Traceback" not in before
    return f"error: {message}"


def test_places_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert f"{tmp_path}/nowhere: no such folder. Name a checkpoint" in _refusal(capsys, tmp_path / "nowhere")
    message = _refusal(capsys, tmp_path)
    assert f"{tmp_path}: no whole checkpoint there" in message
    assert "A model's folder would have a config.json, which is not there either" in message


def test_damaged_weights(folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = _refusal(capsys, folder)
    assert "1 of the model's tensors are not in its files (lm_head.weight ...)" in message
    (folder / "model.safetensors").write_bytes(b"short")
    assert f"{folder}/model.safetensors: truncated or damaged safetensors" in _refusal(capsys, folder)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoint" / "step-2" / "__0_0.distcp").unlink()
    assert "step-2 is damaged: __0_0.distcp is missing." in _refusal(capsys, tmp_path / "run")


def test_without_a_tokenizer_or_a_template(folder: Path, run: Path, capsys: pytest.CaptureFixture[str]):
    assert "--chat: the tokenizer has no chat template" in _refusal(capsys, run, "--chat")
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink()
    message = _refusal(capsys, folder)
    assert f"{folder}: no tokenizer there. Name one with --tokenizer" in message
    assert (
        main([str(folder), "--prompt", "a", "--max_new_tokens", "2", "--tokenizer", "byt5", "--temperature", "0"]) == 0
    )
    assert capsys.readouterr().out == "abc\n"


def test_prompts_that_cannot_be_continued(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert '--prompt "": no token to begin with' in _refusal(capsys, folder, prompt="")
    config = GPT2Config(vocab_size=120, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    arguments = (tmp_path / "gpt2", "--tokenizer", "byt5", "--max_new_tokens", "6")
    message = _refusal(capsys, *arguments)
    assert "--max_new_tokens 6: with a prompt of 3 tokens it passes the 8 positions that GPT2LMHeadModel" in message
    assert "at most 5 fit" in message
    message = _refusal(capsys, *arguments, prompt="xyz")
    assert "its token 125 is none of the model's, which has 120" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0: must be at least 0"),
        (["--prompt", "a", "--top_p", "0"], "--top_p 0.0: must be above 0 and at most 1"),
        (["--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens 0: must be at least 1"),
        ([], "the following arguments are required: --prompt"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["folder", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
