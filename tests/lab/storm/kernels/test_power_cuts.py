"""Power cuts while `site.yml` runs: one of each host; STORM sets how many more, at drawn moments."""

import os
import random
import time

import pytest
from estate import HOSTS, Client, Lab, answers

BROKEN = "/etc/redis/redis.conf /opt/llmkeep/current /etc/nginx/conf.d/llmkeep-edge.conf"
CUTS = [
    [(host, 15.0) for host in HOSTS[::-1]]
]  # llm1 during one run, and ops1 during the run that would repair it
CUTS += [
    [(host, random.Random(f"{host} {number}").uniform(2, 90))]  # noqa: S311 - moments, no secrets
    for number in range(int(os.environ.get("STORM", "0")))
    for host in HOSTS[::-1]
]


@pytest.mark.parametrize(
    "cuts", CUTS, ids=lambda cuts: "-".join(f"{host}-{seconds:.1f}" for host, seconds in cuts)
)
def test_a_power_cut_during_site_converges_at_the_next_run(
    estate: Lab, client: Client, cuts: list[tuple[str, float]]
) -> None:
    estate.on("llm1", f"rm -rf {BROKEN}")
    for host, seconds in cuts:
        run = f"systemd-run --quiet --collect --unit=site --setenv=HOME=/root {estate.site_command}"
        estate.on("ops1", run)
        time.sleep(seconds)
        estate.run("power-off", host)
        estate.run("power-on", host)
        estate.on("ops1", "systemctl stop site.service", check=False)
    estate.site()
    assert "Paris" in answers(client)
