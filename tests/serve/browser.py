"""A headless Chromium with the chat page in it, and the few things that a person does there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

AXE = Path(__file__).parent / "vendor" / "axe.min.js"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


class Browser:
    """One page in one Chromium."""

    def __init__(self, downloads: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.driver.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads), "eventsEnabled": False}
        )
        self.downloads = downloads

    def visit(self, address: str) -> None:
        """The page as somebody sees it who has never been there, on a desk's screen."""
        self.resize(1200, 800)
        self.prefer("light")
        self.driver.execute_cdp_cmd(
            "Storage.clearDataForOrigin", {"origin": address.rstrip("/"), "storageTypes": "local_storage"}
        )
        self.driver.get(f"{address}icon.svg")
        self.script("sessionStorage.clear()")
        self.driver.get_log("browser")
        self.driver.get(address)
        self._loaded()

    def reload(self) -> None:
        self.driver.refresh()
        self._loaded()

    def _loaded(self) -> None:
        self.wait(lambda: self.script("return document.readyState === 'complete'"))
        self.wait(lambda: any(map(self.shown, ("#model", "#only-model", "#notice"))))

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, theme: str) -> None:
        """What the system's own colours are."""
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def script(self, source: str, *arguments: Any) -> Any:
        return self.driver.execute_script(source, *arguments)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def shown(self, selector: str) -> bool:
        return any(element.is_displayed() for element in self.all(selector))

    def text(self, selector: str) -> str:
        """Of the last such element, hidden parts included; empty where there is none."""
        found = self.all(selector)
        return found[-1].get_property("textContent") if found else ""

    def click(self, selector: str) -> None:
        """The last such element."""
        self.all(selector)[-1].click()

    def wait(self, condition: Callable[[], Any]) -> Any:
        """What `condition` gives as soon as it is true. The page may be redrawing meanwhile."""
        waiter = WebDriverWait(self.driver, 10, 0.02, ignored_exceptions=[StaleElementReferenceException])
        return waiter.until(lambda _: condition())

    def write(self, text: str, *, send: bool = True) -> None:
        self.find("#prompt").send_keys(text, Keys.ENTER if send else "")

    def ask(self, text: str) -> None:
        """Send a message and wait for the end of the answer."""
        answers = len(self.all(".answer"))
        self.write(text)
        self.wait(lambda: len(self.all(".answer")) == answers + 1)
        self.settled()

    def settled(self) -> None:
        """Wait until nothing is being answered."""
        self.wait(lambda: not self.all(".answer.running") and not self.all("#messages.busy"))

    def complaints(self) -> list[str]:
        """What the console has to say, but for answers of the service that are errors."""
        entries = [str(entry["message"]) for entry in self.driver.get_log("browser")]
        return [entry for entry in entries if "Failed to load resource" not in entry]

    def violations(self) -> list[dict[str, Any]]:
        """Serious and critical findings of axe-core on the page as it is."""
        self.script(AXE.read_text(encoding="utf-8"))
        found = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run().then((r) => done(JSON.stringify(r.violations)))"
        )
        return [
            {"rule": rule["id"], "where": [node["html"][:120] for node in rule["nodes"]]}
            for rule in json.loads(found)
            if rule["impact"] in ("serious", "critical")
        ]
