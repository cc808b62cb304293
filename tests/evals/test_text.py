import json
import math
import re
import string
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

import vlmaccel
from tests.support.models import VOCAB, build
from vlmaccel import cli
from vlmaccel.evals import text_report
from vlmaccel.evals.needle import MAX_NEW_TOKENS, find, hide, hit
from vlmaccel.evals.smollm2 import default_directory
from vlmaccel.evals.text import Perplexity, cut, load, perplexity, text_source, tokens_of
from vlmaccel.evals.text_eval import evaluate
from vlmaccel.evals.text_result import TextSettings
from vlmaccel.methods import FastV, Uniform

WORDS = "\n".join(f"line {i}: the quick brown fox, number {i * i}, jumps over it." for i in range(80))
SMALL = TextSettings(
    context=24, windows=3, lengths=(200, 260), needles=2, turns=1, timed_prompt=32, timed_tokens=4, batch_size=2
)


class Silent:
    def __init__(self):
        self.parts = {}

    def start(self, what, total):
        self.what = what
        self.parts[what] = [0, total]

    def advance(self, count):
        self.parts[self.what][0] += count


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    """A token a character."""
    letters = ["<pad>", "<s>", *(c for c in string.printable if c not in "\r\x0b\x0c")]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    assert len(letters) <= VOCAB
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>")


@pytest.fixture
def windows(tokenizer):
    return cut(tokens_of(tokenizer, WORDS), 24, 3)


@pytest.fixture(scope="module")
def directory(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def by_hand(model, windows, first):
    """Mean loss of each window's tokens from `first` on."""
    losses = []
    for window in windows:
        with torch.inference_mode():
            log_p = model(window[None]).logits[0].double().log_softmax(-1)
        losses.append(-sum(log_p[i - 1, window[i]].item() for i in range(first, len(window))) / (len(window) - first))
    return losses


def test_plain_perplexity(model, windows):
    found = perplexity(model, windows, prefill=0)
    losses = by_hand(model, windows, 1)
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert found.ppl == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert found.tokens == 23
    assert found.kv_bytes == found.kv_bytes_full == 0


@pytest.mark.parametrize("step", [1, 5, 100])
@pytest.mark.parametrize("prefill", [0.1, 0.5, 0.95])
def test_a_continuation_scores_what_one_forward_does(model, windows, prefill, step):
    first = round(prefill * 24)
    ticks = []
    found = perplexity(model, windows, prefill, step, batch_size=2, tick=ticks.append)
    assert found.losses == pytest.approx(by_hand(model, windows, first), rel=1e-4)
    assert found.tokens == 24 - first and sum(ticks) == 3 * found.tokens
    token = 2 * 6 * 2 * 8 * 4  # keys and values, layers, KV heads, head_dim, bytes of a float32
    assert found.kv_bytes == found.kv_bytes_full == first * token
    assert found.kv_bytes_end == found.kv_bytes_full_end == 23 * token


def test_keeping_everything_changes_nothing_and_dropping_does(model, windows):
    plain = perplexity(model, windows)
    with vlmaccel.patched(model, FastV(layer=2, ratio=1.0)):
        assert perplexity(model, windows).losses == plain.losses
    with vlmaccel.patched(model, Uniform(layer=2, ratio=0.25)):
        dropped = perplexity(model, windows)
    change, error = dropped.change(plain)
    assert abs(change) > 1e-3 and error > 0
    assert dropped.kv_bytes < dropped.kv_bytes_full == plain.kv_bytes_full


def test_change_is_paired():
    base, other = Perplexity((1.0, 3.0), 5), Perplexity((1.1, 3.1), 5)
    change, error = other.change(base)
    assert change == pytest.approx(math.exp(0.1) - 1) and error == pytest.approx(0, abs=1e-9)
    assert math.isnan(Perplexity((1.0,), 5).change(Perplexity((2.0,), 5))[1])


@pytest.mark.parametrize(("prefill", "step"), [(1.0, 1), (-0.1, 1), (0.01, 1), (0.5, 0)])
def test_nothing_to_score_is_an_error(model, windows, prefill, step):
    with pytest.raises(ValueError, match="prefill is a share|step and batch_size"):
        perplexity(model, windows, prefill, step)


def test_too_little_text_or_too_few_positions(model, tokenizer):
    tokens = tokens_of(tokenizer, WORDS)
    with pytest.raises(ValueError, match=f"has {len(tokens)} tokens, too few for 2 windows of 5000"):
        cut(tokens, 5000, 2)
    with pytest.raises(ValueError, match="600 tokens are more than the model's 512 positions"):
        perplexity(model, cut(tokens, 600, 1))
    with pytest.raises(ValueError, match="too few for a haystack"):
        hide(tokenizer, tokens, 10_000)
    with pytest.raises(ValueError, match="need more than 90 tokens"):
        hide(tokenizer, tokens, 90)


def test_text_sources(tmp_path):
    assert len(text_source()) > 100_000 and "\n\n" in text_source()
    file = tmp_path / "book.txt"
    file.write_text("Été à la mer.", encoding="utf-8")
    assert text_source(str(file)) == "Été à la mer."
    file.write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        text_source(str(file))
    with pytest.raises(ValueError, match="no text file nowhere.txt.*'pydoc'"):
        text_source("nowhere.txt")


def test_hits_are_exact():
    assert hit("It is 48213.", "48213") and hit("**48213**", "48213")
    assert not any(hit(answer, "48213") for answer in ("", "482130", "148213", "48,213", "48 213", "4821"))


@pytest.mark.parametrize("chat", [False, True])
def test_needles_lie_where_they_should(tokenizer, chat):
    tokenizer.chat_template = "{{ messages[0]['content'] }}<s>" if chat else None
    needles = hide(tokenizer, tokens_of(tokenizer, WORDS), 400, count=5)
    tokenizer.chat_template = None
    assert [needle.depth for needle in needles] == [0, 0.25, 0.5, 0.75, 1]
    assert len({needle.code for needle in needles}) == 5
    for needle in needles:
        assert 380 - MAX_NEW_TOKENS <= needle.ids.shape[1] <= 400 - MAX_NEW_TOKENS
        prompt = tokenizer.decode(needle.ids[0], skip_special_tokens=not chat)
        text, _, asked = prompt.partition("\n\nWhat is the secret number of")
        (line,) = re.findall(rf"(?:^|\n)(The secret number of \w+ is {needle.code}\.)(?:\n|$)", text)
        place = text.index(line) / (len(text) - len(line))
        assert needle.depth == pytest.approx(place, abs=0.2)  # at the end of the haystack's next line
        assert asked.endswith("<s>" if chat else " is")
    again = hide(tokenizer, tokens_of(tokenizer, WORDS), 400, count=5)
    assert [needle.code for needle in again] == [needle.code for needle in needles]


def test_one_needle_lies_in_the_middle(tokenizer):
    assert [needle.depth for needle in hide(tokenizer, tokens_of(tokenizer, WORDS), 400, count=1)] == [0.5]


def test_answers_are_scored(tokenizer):
    needles = hide(tokenizer, tokens_of(tokenizer, WORDS), 300, count=3)
    answers = iter([f" {needles[0].code}!", "I do not know", f"1{needles[2].code}"])

    class Fake:
        device = torch.device("cpu")
        config = hf.LlamaConfig(max_position_embeddings=300)

        def generate(self, ids, **options):
            assert options["do_sample"] is False and options["max_new_tokens"] == MAX_NEW_TOKENS
            return torch.cat([ids, tokens_of(tokenizer, next(answers))[None]], 1)

    found = find(Fake(), tokenizer, needles)
    assert [one.hit for one in found] == [True, False, False]
    assert found[0].answer == f"{needles[0].code}!" and found[0].kv_bytes == 0


def test_the_whole_evaluation(model, tokenizer):
    progress = Silent()
    ways = {"fastv": FastV(layer=2, ratio=0.25), "all": FastV(layer=2, ratio=1.0)}
    result = evaluate(model, tokenizer, WORDS, ways, SMALL, progress, {"model": "tiny", "text": "words"})
    assert all(done == total for done, total in progress.parts.values())
    with pytest.raises(RuntimeError, match="not patched"):
        vlmaccel.stats(model)
    report = json.loads(json.dumps(result.report(), allow_nan=False))
    base, fastv, everything = (report["ways"][way] for way in ("unpatched", "fastv", "all"))
    assert list(report["ways"]) == ["unpatched", "fastv", "all"]
    assert everything["perplexity"]["ppl"] == base["perplexity"]["ppl"] != fastv["perplexity"]["ppl"]
    assert base["perplexity"]["tokens"] == 12
    for length in ("200", "260"):
        row = fastv["needles"][length]
        assert row["needles"] == 2 and row["kv_bytes"] < 0.8 * row["kv_bytes_full"]
        texts = [[one["answer"] for one in way["needles"][length]["answers"]] for way in (base, everything)]
        assert texts[0] == texts[1]
        assert base["needles"][length]["kv_bytes"] is None
    assert base["speed"]["decode_speedup"]["median"] == 1 and base["speed"]["tokens_per_second"] > 0
    assert "FastV(layer=2, ratio=0.25" in report["settings"]["methods"]["fastv"]
    assert text_report.table(result).row_count == 3
    assert len(text_report.notes(result)) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefill": 0}, "give no method, or a prefill above 0"),
        ({"windows": 0, "needles": 0, "turns": 0}, "nothing is to be measured"),
        ({"lengths": (600,)}, "600 tokens are more than the model's 512 positions"),
        ({"timed_prompt": 510}, "514 tokens are more"),
    ],
)
def test_bad_settings_are_refused_before_the_work(model, tokenizer, change, message):
    settings = TextSettings(**(vars(SMALL) | change))
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, WORDS, {"fastv": FastV(layer=2)}, settings, SimpleNamespace())


def test_command(directory, tmp_path):
    out, book = tmp_path / "new" / "result.json", tmp_path / "book.txt"
    book.write_text(WORDS)
    sizes = {
        "context": 24,
        "windows": 3,
        "length": 200,
        "needles": 2,
        "turns": 1,
        "timed-prompt": 32,
        "timed-tokens": 3,
    }
    args = ["eval", "text", "--model", directory, "--text", str(book), "--out", str(out)]
    args += [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    way = "pyramiddrop:ratios=0.5,0.25,0.1,positions=renumber"
    ran = CliRunner().invoke(cli.app, [*args, "--method", "fastv", "--method", way])
    assert ran.exit_code == 0, ran.output
    assert "needle 200" in ran.stdout and way in ran.stdout and "12 tokens, one at a time" in ran.stdout
    report = json.loads(out.read_text())
    assert list(report["ways"]) == ["unpatched", "fastv", way]
    assert "ratios=(0.5, 0.25, 0.1)" in report["settings"]["methods"][way]
    assert report["ways"][way]["perplexity"]["kv_bytes"] < report["ways"][way]["perplexity"]["kv_bytes_full"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "nothing"], "there is no method 'nothing'"),
        (["--method", "fastv:quick"], "--method fastv: takes key=value"),
        (["--method", "fastv:speed=1"], "fastv has no option speed"),
        (["--model", "/no/such/model"], "there is no model directory /no/such/model"),
        (["--text", "/no/such/file"], "there is no text file /no/such/file"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_command_errors(directory, args, message):
    ran = CliRunner().invoke(cli.app, ["eval", "text", "--model", directory, *args])
    assert ran.exit_code == 2
    assert message in ran.output


def test_a_missing_smollm2_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="python -m vlmaccel.evals.smollm2 gets it"):
        load()


@pytest.mark.slow
def test_smollm2_has_its_perplexity_and_finds_needles():
    if not default_directory().is_dir():
        pytest.skip("SmolLM2 is not there: python -m vlmaccel.evals.smollm2 gets it")
    model, tokenizer = load(device="cpu")
    tokens = tokens_of(tokenizer, text_source())
    # the text differs a little from one version of Python to the next
    assert perplexity(model, cut(tokens, 1024, 6), prefill=0).ppl == pytest.approx(13.25, abs=0.5)
    assert sum(one.hit for one in find(model, tokenizer, hide(tokenizer, tokens, 1024, 5))) >= 4
