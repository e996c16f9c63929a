"""A signal ends a compile even where Python drops the exception that it raises."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import pytest

from pmkvq_compiler import cli
from pmkvq_compiler.interrupts import Interrupted, Signals, watched


@pytest.fixture(autouse=True)
def as_in_a_shell() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Swallows:
    """Python prints what a `__del__` raises and drops it."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_is_swallowed_is_raised_again_at_each_step() -> None:
    with watched() as signals:
        report = signals.checking(lambda stage, done, total: None)
        report("calibrate", 0, 3)
        for _ in range(3):
            Swallows()
            with pytest.raises(Interrupted, match="interrupted; nothing was changed"):
                report("calibrate", 1, 3)


def test_a_step_that_swallows_everything_is_ended_after_it() -> None:
    def swallow(stage: str, done: int, total: int) -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)

    with watched() as signals, pytest.raises(Interrupted, match="terminated"):
        signals.checking(swallow)("calibrate", 0, 1)
    assert signals.exit_code == 143


def test_what_must_be_whole_is_not_interrupted_and_what_is_said_is_true_by_then() -> None:
    with watched() as signals:
        with signals.deferred():
            signal.raise_signal(signal.SIGINT)
            signals.check()
            signals.state = "out is the new artifact, whole"
        with pytest.raises(Interrupted, match="interrupted; out is the new artifact, whole"):
            signals.check()


def test_handlers_are_as_before_and_those_of_the_caller_stay() -> None:
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in names]
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with watched() as outer, watched() as inner:
            assert outer is inner
            signal.raise_signal(signal.SIGHUP)
            outer.check()
    finally:
        signal.signal(signal.SIGHUP, ignored)
    assert [signal.getsignal(number) for number in names] == before


def test_a_thread_can_compile_and_handles_no_signals() -> None:
    found: list[Signals] = []

    def work() -> None:
        with watched() as signals:
            found.append(signals)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (signals,) = found
    signals.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def disguise(*_: object) -> None:
    """As torch.export does with whatever ends its work."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise RuntimeError("this model cannot be exported") from error


def test_an_interrupt_that_a_library_makes_another_error_of_is_an_interrupt() -> None:
    with pytest.raises(Interrupted, match="interrupted; nothing was changed"), watched():
        disguise()
    with pytest.raises(Interrupted), watched(), watched():
        disguise()
    with pytest.raises(RuntimeError, match="for another reason"), watched():
        raise RuntimeError("for another reason")


@pytest.mark.parametrize("command", ["_compile", "_explore"])
def test_the_command_says_so_too(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, command, disguise)
    budget = ["--budget", "1GiB"] if command == "_compile" else ["--budgets", "1GiB,2GiB", "--dry-run"]
    assert cli.main(["model", *budget]) == 130
    assert capsys.readouterr().err == "pmkvq-compile: interrupted; nothing was changed\n"
