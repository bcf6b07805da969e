from tests.fake_hub import fake_hub  # noqa: F401  (a fixture)
