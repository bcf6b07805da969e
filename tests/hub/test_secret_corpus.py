"""No planted secret or personal path passes the search, and ordinary cards have no matches."""

import pytest

from mlx_dpo.hub.secret_scan import scan_for_secrets
from tests.hub.planted_secrets import FORMS, Maker, ordinary_cards, personal_paths, secrets


@pytest.mark.parametrize("seed", [1, 2])
def test_no_planted_secret_passes(seed):
    planted = secrets(Maker(seed)) | {
        f"path {k}": t for k, t in personal_paths(Maker(seed)).items()
    }
    assert len(planted) > 110
    passed = [
        (kind, form)
        for kind, text in planted.items()
        for form in FORMS
        if not list(scan_for_secrets(form.replace("{}", text).encode(), "README.md"))
    ]
    assert passed == []


@pytest.mark.parametrize("seed", [1, 2])
def test_ordinary_cards_have_no_matches(seed):
    cards = ordinary_cards(Maker(seed))
    assert len(cards) >= 50
    found = {card: list(scan_for_secrets(card.encode(), "README.md")) for card in cards}
    assert {card: matches for card, matches in found.items() if matches} == {}
