/** Where a person writes: the text, DeepThink and its effort, send and stop. */

export const EFFORTS = ["minimal", "low", "medium", "high", "max"];

export class Composer {
  /**
   * @param {object} actions `send(text)`, `stop()`, `change({think, effort})`, `write(text)` with all that stands there
   */
  constructor(actions) {
    this.actions = actions;
    const byId = (id) => document.getElementById(id);
    this.text = byId("prompt");
    this.button = byId("send");
    this.think = byId("think");
    this.effort = byId("effort");
    this.effortName = byId("effort-name");
    this.effortRow = byId("effort-row");
    this.hint = byId("think-hint");
    this.busy = false;
    this.ready = false;
    this.#listen();
    this.#update();
  }

  #listen() {
    this.text.addEventListener("input", () => {
      this.#update();
      this.actions.write(this.text.value);
    });
    this.text.addEventListener("keydown", (event) => this.#onKey(event));
    document.getElementById("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.busy) this.actions.stop();
      else this.#send();
    });
    this.think.addEventListener("click", () => {
      if (this.think.getAttribute("aria-disabled") === "true") return;
      this.actions.change({ think: this.think.getAttribute("aria-pressed") !== "true" });
    });
    this.effort.addEventListener("input", () => this.actions.change({ effort: EFFORTS[this.effort.valueAsNumber] }));
  }

  #onKey(event) {
    // On a phone's keyboard there is no Shift+Enter, and while composing (Chinese, Japanese) Enter picks a word.
    const touch = matchMedia("(pointer: coarse)").matches;
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch) return;
    event.preventDefault();
    if (!this.busy) this.#send();
  }

  #send() {
    const text = this.text.value.trim();
    if (!text || !this.ready) return;
    this.write("");
    this.actions.write("");
    this.actions.send(text);
  }

  /** Put a draft into the field. */
  write(text) {
    this.text.value = text;
    this.#update();
  }

  /** What the settings and the model make of the controls. `model` is null until one is known. */
  show(settings, model) {
    const can = model?.thinking === true;
    const on = can && settings.think;
    this.ready = model !== null;
    this.think.setAttribute("aria-pressed", String(on));
    this.think.setAttribute("aria-disabled", String(!can));
    this.hint.hidden = can || model === null;
    this.effortRow.hidden = !on;
    this.effort.value = String(EFFORTS.indexOf(settings.effort));
    this.effort.setAttribute("aria-valuetext", settings.effort);
    this.effortName.textContent = settings.effort;
    this.#update();
  }

  setBusy(busy) {
    this.busy = busy;
    this.#update();
  }

  #update() {
    const label = this.busy ? "Stop answering" : "Send";
    this.button.setAttribute("aria-label", label);
    this.button.title = this.busy ? "Stop answering (Esc)" : "Send (Enter)";
    this.button.classList.toggle("stop", this.busy);
    this.button.querySelector("use").setAttribute("href", this.busy ? "#icon-stop" : "#icon-send");
    this.button.disabled = !this.busy && (!this.ready || !this.text.value.trim());
    // As tall as its text, up to what the style sheet allows.
    this.text.style.height = "auto";
    this.text.style.height = `${this.text.scrollHeight + 2}px`;
  }
}
