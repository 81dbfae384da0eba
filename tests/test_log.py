"""Messages are printed once, whoever else logs."""

import logging

from jaxtune import log


def test_a_handler_that_another_library_adds_prints_nothing_again(monkeypatch, capsys):
    ours = logging.getLogger("jaxtune")
    monkeypatch.setattr(logging.root, "handlers", [])
    for name, value in (("handlers", []), ("propagate", True), ("level", logging.NOTSET)):
        monkeypatch.setattr(ours, name, value)
    log.show()
    logging.basicConfig(force=True)
    log.get_logger("jaxtune.training").info("step 1")
    assert capsys.readouterr().err == "jaxtune: step 1\n"


def test_what_the_user_has_configured_is_left_alone(monkeypatch, capsys):
    ours = logging.getLogger("jaxtune")
    monkeypatch.setattr(logging.root, "handlers", [])
    for name, value in (("handlers", []), ("propagate", True), ("level", logging.NOTSET)):
        monkeypatch.setattr(ours, name, value)
    logging.basicConfig(format="mine: %(message)s")
    log.show()
    log.get_logger("jaxtune.training").info("step 1")
    assert capsys.readouterr().err == "mine: step 1\n"
