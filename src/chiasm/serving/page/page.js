// The chat page: pictures in, answers out as they are written, one or two models side by side.

import { look } from "./look.js";
import { fileToPicture } from "./pictures.js";
import { ask, ApiError, listModels } from "./api.js";
import { language, speak, translate, word } from "./words.js";

const find = (id) => document.getElementById(id);
const main = find("main"), turns = find("turns"), question = find("question"), settings = find("settings");
const picks = [find("model-0"), find("model-1")];

const state = {
  pictures: [],          // for the next question
  histories: [[], []],   // one conversation for each place
  comparing: false,
  stop: null,            // ends the answers that are being written
};

const kept = {
  get: (name) => { try { return localStorage.getItem(name); } catch { return null; } },
  set: (name, value) => { try { localStorage.setItem(name, value); } catch { /* private windows keep nothing */ } },
};

export const key = () => find("key").value.trim();

// Questions and answers

async function send() {
  const text = question.value.trim();
  if (!text || state.stop || !picks[0].value) return;
  const pictures = state.pictures;
  const turn = copy("turn");
  document.body.classList.remove("fresh");
  turn.querySelector(".shown").append(...pictures.map((picture) => item(image(picture.url, word("picture", { number: 1 })))));
  turn.querySelector(".words").textContent = text;
  turns.append(turn);
  question.value = "";
  state.pictures = [];
  const { histories } = state, stop = state.stop = new AbortController();
  grow();
  showPictures();
  showBusy(true);
  const content = [...pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } })), { type: "text", text }];
  const places = state.comparing ? [0, 1] : [0];
  await Promise.all(places.map((place) => answer(turn.querySelector(".answers"), place, content, histories, stop.signal)));
  if (state.stop === stop) rest();
}

// The histories are those of the turn: by its end, there may be a new conversation.
async function answer(row, place, content, histories, signal) {
  const model = picks[place].value, messages = [...histories[place], { role: "user", content }];
  const card = copy("answer"), text = card.querySelector(".text"), note = card.querySelector(".note");
  card.querySelector("h3").textContent = model;
  row.append(card);
  scroll(true);
  const begun = performance.now();
  let said = "", usage = null, reason = null, drawn = 0;
  const finish = () => { drawn = 0; if (text.textContent !== said) text.textContent = said; scroll(); };
  const paint = () => { drawn ||= requestAnimationFrame(finish); };   // a frame is enough, however fast words come
  const options = { temperature: number("temperature", 0), max_tokens: number("length", 256) };
  try {
    for await (const chunk of ask({ model, messages, ...options }, key(), signal)) {
      const choice = chunk.choices[0];
      said += choice?.delta.content ?? "";
      reason = choice?.finish_reason ?? reason;
      usage = chunk.usage ?? usage;
      paint();
    }
    const parts = [word("tokens", { count: usage?.completion_tokens ?? "?", seconds: ((performance.now() - begun) / 1000).toFixed(1) })];
    if (reason === "length") parts.push(word("cut"));
    note.textContent = parts.join(" · ");
    find("status").textContent = `${word("answered", { model })}: ${said}`;
  } catch (error) {
    if (error.name === "AbortError") note.textContent = word("stopped");
    else complain(note, error);
  }
  cancelAnimationFrame(drawn);
  finish();
  card.setAttribute("aria-busy", "false");
  if (said.trim()) {
    messages.push({ role: "assistant", content: said });
    histories[place] = messages;
    offerLook(card, model, messages);
  }
}

function complain(note, error) {
  note.classList.add("wrong");
  note.textContent = reasonOf(error);
  note.setAttribute("role", "alert");
  if (error instanceof ApiError && error.status === 401) settings.showModal();
}

function reasonOf(error) {
  if (!(error instanceof ApiError)) return error instanceof TypeError ? word("offline") : word("failed", { message: error.message });
  if (error.status === 401) return word("needs_key");
  if (error.status === 429) return word("full", { seconds: error.retryAfter });
  return word("failed", { message: error.message });
}

function offerLook(card, model, messages) {
  const shown = messages.some((message) => Array.isArray(message.content) && message.content.some((part) => part.type === "image_url"));
  const button = card.querySelector(".look"), label = button.querySelector("span"), figure = card.querySelector(".seen");
  button.hidden = !shown;
  button.addEventListener("click", async () => {
    const open = figure.hidden;
    if (open && !figure.dataset.ready) {
      button.disabled = true;
      label.textContent = word("looking");
      try {
        await look(card, { model, messages }, key());
        figure.dataset.ready = "yes";
      } catch (error) {
        if (error.code === "no_attention") card.querySelector(".note").textContent += ` · ${word("unseen")}`;
        else complain(card.querySelector(".note"), error);
        button.hidden = error.code === "no_attention";
      }
      button.disabled = false;
    }
    figure.hidden = !(open && figure.dataset.ready);
    card.classList.toggle("looking", !figure.hidden);
    for (const one of card.querySelectorAll(".word")) one.disabled = figure.hidden;   // plain text again
    button.setAttribute("aria-expanded", String(!figure.hidden));
    label.dataset.word = figure.hidden ? "look" : "hide";
    label.textContent = word(label.dataset.word);
    if (!figure.hidden) figure.scrollIntoView({ block: "nearest" });
  });
}

// Pictures

async function take(files) {
  const unread = [];
  for (const file of files) {
    try {
      state.pictures.push(await fileToPicture(file));
    } catch {
      unread.push(word("not_a_picture", { name: file.name }));
    }
  }
  showPictures();
  unread.forEach(alertLine);
  question.focus();
}

function alertLine(text) {
  const line = document.createElement("li");
  line.className = "note wrong";
  line.setAttribute("role", "alert");
  line.textContent = text;
  find("pictures").append(line);
  setTimeout(() => line.remove(), 6000);
}

function showPictures() {
  const rows = state.pictures.map((picture, place) => {
    const remove = document.createElement("button");
    remove.type = "button";
    remove.setAttribute("aria-label", word("remove", { number: place + 1 }));
    remove.innerHTML = '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="m6 6 12 12M18 6 6 18"/></svg>';
    remove.addEventListener("click", () => { state.pictures.splice(place, 1); showPictures(); question.focus(); });
    return item(image(picture.url, picture.name), remove);
  });
  find("pictures").replaceChildren(...rows);
}

// Small parts

function copy(name) {
  const node = find(name).content.cloneNode(true);
  translate(node);
  return node.firstElementChild;
}

function image(url, text) {
  const node = new Image();
  node.src = url;
  node.alt = text;
  return node;
}

function item(...children) {
  const node = document.createElement("li");
  node.append(...children);
  return node;
}

const number = (id, other) => { const value = find(id).valueAsNumber; return Number.isFinite(value) ? value : other; };

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

function scroll(always = false) {
  if (always || main.scrollHeight - main.scrollTop - main.clientHeight < 120) main.scrollTop = main.scrollHeight;
}

function showBusy(busy) {
  find("send").hidden = busy;
  find("stop").hidden = !busy;
}

function rest() {
  state.stop = null;
  showBusy(false);
}

function restart() {
  state.stop?.abort();
  rest();
  state.histories = [[], []];
  turns.replaceChildren();
  document.body.classList.add("fresh");
  question.focus();
}

function compare(on) {
  state.comparing = on;
  state.histories[1] = [...state.histories[0]];
  document.body.classList.toggle("comparing", on);
  find("compare").setAttribute("aria-pressed", String(on));
  picks[1].parentElement.hidden = !on;
}

async function showModels() {
  try {
    const names = (await listModels(key())).filter((model) => model.kind === "chat").map((model) => model.id);
    for (const [place, pick] of picks.entries()) {
      const before = pick.value;
      pick.replaceChildren(...names.map((name) => new Option(name, name)));
      pick.value = names.includes(before) ? before : names[Math.min(place, names.length - 1)] ?? "";
    }
    find("compare").hidden = names.length < 2;
    if (!names.length) alertLine(word("no_models"));
  } catch (error) {
    alertLine(reasonOf(error));
    if (error instanceof ApiError && error.status === 401) settings.showModal();
  }
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  kept.set("theme", name);
}

// What people do

find("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
question.addEventListener("input", grow);
question.addEventListener("keydown", (event) => {
  // A letter that is still being composed (Korean, Japanese, Chinese) also ends with Enter.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) { event.preventDefault(); send(); }
});
find("stop").addEventListener("click", () => state.stop?.abort());
find("new").addEventListener("click", restart);
find("compare").addEventListener("click", () => compare(!state.comparing));
find("language").addEventListener("click", () => { speak(language() === "ko" ? "en" : "ko"); kept.set("language", language()); });
find("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
find("settings-open").addEventListener("click", () => settings.showModal());
settings.addEventListener("close", showModels);
for (const id of ["add", "choose"]) find(id).addEventListener("click", () => find("file").click());
find("file").addEventListener("change", (event) => { take([...event.target.files]); event.target.value = ""; });
addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) { event.preventDefault(); take(files); }
});
let inside = 0;
addEventListener("dragenter", (event) => { event.preventDefault(); inside += 1; find("drop").hidden = false; });
addEventListener("dragleave", () => { inside -= 1; find("drop").hidden = inside > 0; });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => { event.preventDefault(); inside = 0; find("drop").hidden = true; take([...event.dataTransfer.files]); });

speak(kept.get("language") ?? (navigator.language.startsWith("ko") ? "ko" : "en"));
theme(kept.get("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
showModels();
