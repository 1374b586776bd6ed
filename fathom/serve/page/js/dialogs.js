/** The settings, and the two small questions: a new name, and whether to delete. */

import { apiKey } from "./store.js";

/** Show a dialog of index.html; resolves with whether its form was sent. */
function ask(id) {
  const dialog = document.getElementById(id);
  const form = dialog.querySelector("form");
  return new Promise((resolve) => {
    let sent = false;
    const submit = (event) => {
      event.preventDefault(); // the page's policy lets no form be sent anywhere, and none needs to be
      sent = true;
      dialog.close();
    };
    const cancel = () => dialog.close();
    form.addEventListener("submit", submit);
    form.querySelector("[data-cancel]").addEventListener("click", cancel);
    dialog.addEventListener(
      "close",
      () => {
        form.removeEventListener("submit", submit);
        form.querySelector("[data-cancel]").removeEventListener("click", cancel);
        resolve(sent);
      },
      { once: true },
    );
    dialog.showModal();
  });
}

/** The new name, or null. */
export async function askName(name) {
  const field = document.getElementById("rename-field");
  field.value = name;
  const answer = ask("rename-dialog");
  field.select();
  return (await answer) && field.value.trim() ? field.value.trim().slice(0, 200) : null;
}

export function askDelete(title) {
  document.getElementById("delete-title").textContent = title;
  return ask("delete-dialog");
}

const FIELDS = ["system", "temperature", "maxTokens", "budget"];

/** Let a person change the settings; resolves with the changes or null. `focus` names the field to begin with. */
export async function askSettings(settings, model, focus) {
  const field = (name) => document.getElementById(`setting-${name}`);
  for (const name of FIELDS) field(name).value = settings[name];
  field("key").value = apiKey.get();
  document.getElementById("budget-row").hidden = !model?.thinking;
  const answer = ask("settings-dialog");
  if (focus) field(focus).focus();
  if (!(await answer)) return null;
  apiKey.set(field("key").value.trim());
  return Object.fromEntries(FIELDS.map((name) => [name, field(name).value]));
}
