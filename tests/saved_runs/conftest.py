from tests.fake_hub import fake_hub  # noqa: F401  (a fixture)
from tests.run_settings import checkpoint_folder, config, own_cache, pairs_file, settings  # noqa: F401  (fixtures)
