from tests.run_settings import checkpoint_folder, config, own_cache, pairs_file, settings  # noqa: F401  (fixtures)
