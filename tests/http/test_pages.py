"""The experiments' page in a real browser, over a service with something to show."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from serve.identity import Scope
from serve.registry.database import Database
from serve.registry.keys import Keys
from tests.fakes import write_fake_adapter
from tests.served import Served, served

HOSTILE = "<img src=x onerror=\"document.title='taken over'\">"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver on this machine (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1600"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as found:
        yield found


@pytest.fixture(scope="module")
def key_and_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Served]]:
    root, folder = tmp_path_factory.mktemp("adapters"), tmp_path_factory.mktemp("pages")
    for name in ("old", "new", "idea"):
        write_fake_adapter(root / name, name=name)
    settings = {
        "base": {"name": "base"},
        "engine": {"kind": "fake", "options": {"max_running": 64}},
        "adapters": {"roots": [str(root)], "preload": {name: str(root / name) for name in ("old", "new", "idea")}},
        "engines": {"num_cpus": 0.5},
        "auth": {"required": True},
        "experiments": {"look_every_s": 1.0},
    }
    database = Database(f"sqlite:///{folder / 'state' / 'registry.db'}")
    key, _ = Keys(database).create("tester", [Scope.ADMIN])
    database.close()
    with served(folder, settings) as running:
        yield key, running


@pytest.fixture(scope="module")
def experiment(key_and_service: tuple[str, Served]) -> Iterator[httpx.Client]:
    """Two arms and a shadow: the treatment solves more, and is reported slow."""
    key, service = key_and_service
    arms = [
        {"name": "control", "target": "old"},
        {"name": "treatment", "target": "new"},
        {"name": "idea", "target": "idea", "shadow": True},
    ]
    definition = {
        **{"name": "tone", "alias": "support", "arms": arms, "decision_metric": "solved", "description": HOSTILE},
        "metrics": [{"name": "solved"}, {"name": "waited", "kind": "float", "direction": "down"}],
        "guardrails": [
            {"metric": "waited", "tolerance": 0.5, "action": "alert"},
            {"metric": "error_rate", "tolerance": 0.05, "action": "alert"},
        ],
        "analysis": {"units": 400, "min_units": 50},
        "shadow": {"share": 0.2, "store_prompts": True},
    }
    rng = random.Random(0)
    luck = [(rng.random(), rng.uniform(1, 2)) for _ in range(400)]
    with httpx.Client(base_url=service.url, timeout=60, headers={"Authorization": f"Bearer {key}"}) as http:
        http.post("/v1/experiments", json=definition).raise_for_status()
        http.post("/v1/experiments/tone/run", json={"reason": "a look"}).raise_for_status()

        def visit(number: int) -> None:
            body = {"model": "support", "prompt": f"<script>alert({number})</script>", "user": f"u{number}"}
            response = http.post("/v1/completions", json=body).raise_for_status()
            is_treated = response.headers["X-Variant"] == "treatment"
            luck_of, waited = luck[number]
            for metric, value in (
                ("solved", luck_of < (0.8 if is_treated else 0.4)),
                ("waited", waited * (1 + is_treated)),
            ):
                body = {"request_id": response.headers["X-Request-Id"], "metric": metric, "value": value}
                http.post("/v1/feedback", json=body).raise_for_status()

        with ThreadPoolExecutor(8) as pool:
            for first in range(0, 400, 100):
                list(pool.map(visit, range(first, first + 100)))
                time.sleep(1.2)  # a look of its own for each hundred
        yield http


def wait(browser: webdriver.Chrome, css: str) -> None:
    WebDriverWait(browser, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, css))


def enter_key(browser: webdriver.Chrome, service: Served, key: str) -> None:
    browser.get(f"{service.url}/experiments")
    browser.execute_script("sessionStorage.clear()")
    browser.get(f"{service.url}/experiments")
    wait(browser, "[role=alert]")
    assert "API key" in browser.find_element(By.CSS_SELECTOR, "[role=alert]").text
    browser.find_element(By.CSS_SELECTOR, "#key input").send_keys(key)
    browser.find_element(By.CSS_SELECTOR, "#key button").click()


def test_the_page_shows_what_the_results_say(
    browser: webdriver.Chrome, key_and_service: tuple[str, Served], experiment: httpx.Client, tmp_path: Path
):
    key, service = key_and_service
    enter_key(browser, service, key)
    wait(browser, "td a")
    browser.find_element(By.LINK_TEXT, "tone").click()
    wait(browser, "#verdict")
    results = experiment.get("/v1/experiments/tone/results").json()
    assert results["results"]["winner"] is None, "a guardrail is breached for it"
    assert "'treatment' is better in solved, and breaches waited." in browser.find_element(By.ID, "verdict").text
    effects = browser.find_element(By.ID, "effects")
    (compared,) = [c for c in results["results"]["comparisons"] if c["metric"] == "solved"]
    assert f"+{compared['effect']:.3g}" in effects.text and "better" in effects.text
    line = effects.find_element(By.CSS_SELECTOR, "[data-arm=treatment] .line").get_attribute("points")
    assert line is not None and len(line.split()) >= 3, "several looks are drawn"
    band = effects.find_element(By.CSS_SELECTOR, "[data-arm=treatment] .band").get_attribute("points")
    assert band is not None and len(band.split()) == 2 * len(line.split())
    exposure = browser.find_element(By.ID, "exposure")
    assert "as planned" in exposure.text
    for arm in results["results"]["arms"]:
        assert str(arm["units"]) in exposure.find_element(By.CSS_SELECTOR, f"[data-arm={arm['arm']}]").text
    rails = browser.find_element(By.ID, "guardrails")
    assert "breached: waited" in rails.text
    assert len(rails.find_elements(By.CSS_SELECTOR, "[data-guardrail]")) == 2
    assert len(rails.find_elements(By.CSS_SELECTOR, ".breach")) == 1
    pairs = browser.find_element(By.ID, "pairs").text
    assert "<script>alert(" in pairs and "idea:1" in pairs
    assert "a look" in browser.find_element(By.ID, "history").text
    assert HOSTILE in browser.find_element(By.TAG_NAME, "main").text
    assert browser.title == "tone · Loom", "what users and operators wrote stays text"
    browser.save_screenshot(str(tmp_path / "experiment.png"))
    print(f"a picture of it: {tmp_path / 'experiment.png'}")
    Select(effects.find_element(By.TAG_NAME, "select")).select_by_value("waited")
    WebDriverWait(browser, 10).until(
        lambda b: "worse" in b.find_element(By.ID, "effects").text  # more waiting is worse
    )
    errors = [e for e in browser.get_log("browser") if e["level"] == "SEVERE" and "401" not in e["message"]]
    assert not errors


def test_pages_hold_no_secrets_and_let_nothing_in(key_and_service: tuple[str, Served]):
    _, service = key_and_service
    for path in ("/experiments", "/experiments/tone", "/console/charts.js", "/console/experiments.css"):
        response = httpx.get(service.url + path)
        assert response.status_code == 200
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert httpx.get(f"{service.url}/console/../pages.py").status_code == 404
    assert httpx.get(f"{service.url}/v1/experiments").status_code == 401


def test_what_is_not_there_is_said(browser: webdriver.Chrome, key_and_service: tuple[str, Served]):
    key, service = key_and_service
    enter_key(browser, service, key)
    wait(browser, "h1")
    browser.get(f"{service.url}/experiments/nothing")
    wait(browser, "[role=alert]")
    assert "no experiment 'nothing'" in browser.find_element(By.CSS_SELECTOR, "[role=alert]").text
