"""espeak-ng: the same request gives the same samples, whatever was spoken before; mistakes are named."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from support.generated import contents, lines

from palkernels.bench.errors import UserError
from palkernels.bench.study.sounds import espeak, espeak_worker
from palkernels.bench.study.sounds.espeak import Speaker, SpeechError
from palkernels.bench.study.sounds.folder import Settings, make
from palkernels.bench.study.sounds.speech import ACCENTS, LANGUAGES, VOICES

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="needs espeakng-loader: pip install 'palkernels[demo]'",
)
REQUESTS = [(text, voice) for text in ("red", "seven", "yellow boat") for voice in ("en+m3", "en-us+f2", "de+whisper")]


@pytest.fixture(scope="module")
def speaker():
    pytest.importorskip("espeakng_loader", reason="needs espeakng-loader: pip install 'palkernels[demo]'")
    with Speaker() as open_speaker:
        yield open_speaker


def test_an_utterance_depends_on_its_request_alone(speaker):
    first = {request: speaker.speak(*request) for request in REQUESTS}
    assert speaker.rate == 22_050
    for samples in first.values():
        assert samples.dtype == np.float64
        assert 0.1 < np.abs(samples).max() < 1
        assert 0.2 < len(samples) / speaker.rate < 2
    assert len({samples.tobytes() for samples in first.values()}) == len(REQUESTS)
    with Speaker() as other:
        for request in random.Random(0).sample(REQUESTS, len(REQUESTS)):
            assert np.array_equal(other.speak(*request), first[request])
            assert np.array_equal(speaker.speak(*request), first[request])


def test_rate_pitch_and_range_are_heard(speaker):
    usual = speaker.speak("yellow", "en+m3")
    assert len(speaker.speak("yellow", "en+m3", rate=320)) < 0.8 * len(usual)
    assert not np.array_equal(speaker.speak("yellow", "en+m3", pitch=90), usual)
    assert not np.array_equal(speaker.speak("yellow", "en+m3", range=0), usual)


def test_every_voice_of_the_tasks_speaks_and_no_two_are_one(speaker):
    variants = [variant for group in VOICES.values() for variant in group]
    heard = {speaker.speak("seven", f"en+{variant}").tobytes() for variant in variants}
    assert len(heard) == len(variants)
    said = {speaker.speak("seven", f"{accent}+m1").tobytes() for accent in ACCENTS}
    assert len(said) >= len(ACCENTS) - 1  # two accents may share a word
    assert len({speaker.speak("374", language).tobytes() for language in LANGUAGES.values()}) == len(LANGUAGES)


def test_threads_take_turns(speaker):
    first, found = {request: speaker.speak(*request) for request in REQUESTS}, []

    def speak(request):
        found.append(np.array_equal(speaker.speak(*request), first[request]))

    threads = [threading.Thread(target=speak, args=(request,)) for request in REQUESTS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * len(threads)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"text": " "}, "text must hold something to say and no zero byte, got ' '"),
        ({"text": "a\0b"}, "and no zero byte, got"),
        ({"rate": 20}, "rate must be from 80 to 450 words a minute, got 20"),
        ({"pitch": 100}, "pitch must be from 0 to 99, got 100"),
        ({"range": -1}, "range must be from 0 to 99, got -1"),
        ({"voice": "en+nobody"}, r"voice must end with a variant that espeak-ng has, got 'en\+nobody'"),
    ],
)
def test_requests_that_cannot_be(speaker, request_, message):
    with pytest.raises(ValueError, match=message):
        speaker.speak(**{"text": "red", "voice": "en"} | request_)


def test_what_the_library_refuses_is_an_error_and_the_next_request_is_heard(speaker):
    with pytest.raises(SpeechError, match="must take the voice 'xx', got The specified espeak-ng voice does not exist"):
        speaker.speak("red", "xx")
    assert len(speaker.speak("red", "en"))


@needs_espeak
def test_an_ended_process_and_a_closed_speaker_are_errors():
    with Speaker() as speaker:
        os.kill(speaker._process.pid, signal.SIGKILL)
        speaker._process.wait()
        with pytest.raises(SpeechError, match=r"got .*exit code -9"):
            speaker.speak("red", "en")
    with pytest.raises(SpeechError, match="the speaker must be open to speak, got a closed one"):
        speaker.speak("red", "en")
    speaker.close()


@needs_espeak
def test_the_process_ends_with_a_caller_that_was_killed():
    program = (
        "import signal, os\nfrom palkernels.bench.study.sounds.espeak import Speaker\n"
        "print(Speaker()._process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)  # until both have ended
    assert done.returncode == -signal.SIGKILL
    assert int(done.stdout) > 0
    assert done.stderr == ""


@needs_espeak
def test_an_interrupted_request_leaves_no_answer_for_the_next_one(monkeypatch):
    def interrupt(pipe, count):
        raise KeyboardInterrupt

    with Speaker() as speaker:
        with monkeypatch.context() as patch:
            patch.setattr(espeak, "_exactly", interrupt)
            with pytest.raises(KeyboardInterrupt):
                speaker.speak("red", "en")
        with pytest.raises(SpeechError, match="exit code -9"):
            speaker.speak("seven", "en")


def test_a_crash_of_the_library_ends_its_child_alone():
    class Crashing:
        def speak(self, **request):
            os.kill(os.getpid(), signal.SIGKILL)

    class Failing:
        def speak(self, **request):
            raise RuntimeError("no breath")

    status, content = espeak_worker.in_a_child(Crashing(), {"text": "red"})
    assert (status, content) == (1, b"espeak-ng must speak 'red', got exit code -9 of its process")
    assert espeak_worker.in_a_child(Failing(), {"text": "red"}) == (1, b"no breath")


def test_without_the_package_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ModuleNotFoundError, match=r"need espeakng-loader: pip install 'palkernels\[demo\]'"):
        Speaker()
    with pytest.raises(UserError, match=r"need espeakng-loader: pip install 'palkernels\[demo\]'"):
        make(tmp_path, Settings(train=1, test=1, tasks=("words",)))
    make(tmp_path / "tones", Settings(train=1, test=1, tasks=("count",)))


def test_a_library_that_does_not_start_is_an_error(monkeypatch, tmp_path):
    class Loader:
        path = tmp_path / "data"

        def get_data_path(self):
            return str(self.path)

        def get_library_path(self):
            return str(tmp_path / "none.so")

    monkeypatch.setitem(sys.modules, "espeakng_loader", Loader())
    with pytest.raises(SpeechError, match=r"none\.so: cannot open shared object file"):
        Speaker()
    monkeypatch.setattr(Loader, "path", tmp_path / ("x" * 200))
    with pytest.raises(SpeechError, match="must have at most 150 bytes, got"):
        Speaker()


@needs_espeak
def test_a_folder_of_speech_is_the_same_again(tmp_path):
    settings = Settings(train=6, test=4, tasks=("words", "speakers"))
    for name in ("one", "two"):
        make(tmp_path / name, settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    clips = lines(tmp_path / "one" / "speakers" / "clips.jsonl")
    assert len(clips) == 20
    assert {clip["voice"].partition("+")[2] for clip in clips[12:]} <= {
        *VOICES["man", "test"],
        *VOICES["woman", "test"],
    }
