"""The date in a chat template: today, or the day on which a run began."""

import threading
from datetime import date, datetime

import pytest

from mlx_dpo.data.chat_templates import template_date as clock
from mlx_dpo.data.chat_templates.render import TemplateInput, call_template
from tests.data.chat_templates.tool_templates import SILENT, with_template

DATED = "Today is {{ strftime_now('%d %b %Y %H:%M') }}.\n" + SILENT
TURNS = [{"role": "user", "content": "Hi."}]


@pytest.fixture(autouse=True)
def frozen(monkeypatch):
    monkeypatch.setattr(clock, "now", lambda: datetime(2026, 3, 4, 5, 6))


def rendered(tokenizer):
    return call_template(tokenizer, TemplateInput(TURNS, False), tokenize=False)


def test_a_template_prints_the_present_time_or_the_day_that_was_set():
    tokenizer = with_template(DATED)
    assert rendered(tokenizer).startswith("Today is 04 Mar 2026 05:06.")
    clock.set_day(tokenizer, date(2024, 2, 29))
    assert rendered(tokenizer).startswith("Today is 29 Feb 2024 00:00.")
    assert rendered(with_template(DATED)).startswith("Today is 04 Mar 2026")
    clock.set_day(tokenizer, None)
    assert rendered(tokenizer).startswith("Today is 04 Mar 2026 05:06.")


def test_the_day_of_one_rendering_does_not_reach_another_thread():
    texts = []
    tokenizer = with_template(DATED)
    clock.set_day(tokenizer, date(2024, 2, 29))
    with clock.printing_day_of(tokenizer):
        other = threading.Thread(target=lambda: texts.append(clock.strftime_now("%Y")))
        other.start()
        other.join()
        assert clock.strftime_now("%Y") == "2024"
    assert texts == ["2026"]


def test_only_a_template_with_the_date_is_dated():
    assert clock.is_dated(with_template(DATED))
    assert not clock.is_dated(with_template(SILENT))
