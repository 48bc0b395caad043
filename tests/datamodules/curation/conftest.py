import os

import pytest


@pytest.fixture(scope="module")
def ray_address():
    """One Ray for all tests of a file: it takes seconds to start, and some of a core while it runs."""
    if os.environ.get("CI") != "true":
        pytest.importorskip("ray", reason="the extra [curate] is not installed")
    import ray

    from datamodules.curation.run import start_ray

    start_ray(cpus=3)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
