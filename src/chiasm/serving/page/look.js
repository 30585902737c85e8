// Where the words of an answer looked: the picture in its colours where a word looked, veiled elsewhere.

import { attention } from "./api.js";
import { word } from "./words.js";

const VEIL = [18, 24, 26], DARKEST = 0.76, MOSTLY = 0.7;

export async function look(card, request, key) {
  const seen = await attention(request, key);
  const picture = new Image();
  picture.src = seen.picture;
  await picture.decode();
  const canvas = card.querySelector("canvas");
  canvas.height = Math.round((canvas.width * picture.height) / picture.width);
  const every = mean(seen.words.map((one) => one.weights));
  const show = (one) => {
    const even = paint(canvas, picture, one ? one.weights : every, seen.rows, seen.columns);
    card.querySelector(".even").hidden = even < MOSTLY;
    canvas.setAttribute("aria-label", word("looked", { word: one ? one.text : word("all_words") }));
    for (const button of buttons) button.setAttribute("aria-pressed", String(button === one?.button));
  };
  const hint = card.querySelector(".hint");
  hint.dataset.word = seen.queries ? "look_queries" : "look_hint";
  hint.textContent = word(hint.dataset.word);
  const buttons = [], letters = Array.from(seen.answer);   // places count whole characters, as the server does
  const cut = (start, stop) => letters.slice(start, stop).join("");
  const text = card.querySelector(".text");
  text.replaceChildren();
  let end = 0;
  for (const one of seen.words) {
    text.append(cut(end, one.start));
    one.button = Object.assign(document.createElement("button"), { type: "button", className: "word", textContent: cut(one.start, one.end) });
    for (const event of ["pointerenter", "focus", "click"]) one.button.addEventListener(event, () => show(one));
    buttons.push(one.button);
    text.append(one.button);
    end = one.end;
  }
  text.append(cut(end));
  show(null);
}

function mean(rows) {
  return rows[0].map((_, place) => rows.reduce((sum, row) => sum + row[place], 0) / rows.length);
}

// Also tells how even the weights are: 1 where all are equal.
function paint(canvas, picture, weights, rows, columns) {
  const low = Math.min(...weights), high = Math.max(...weights);
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  const span = Math.max(high - low, total / weights.length, 1e-9);   // what hardly differs looks as it is: faint
  const even = high > 0 ? 1 - (high - low) / span : 0;   // then half of the light is everywhere
  const veil = new ImageData(columns, rows);
  weights.forEach((weight, place) => {
    const dark = DARKEST * (1 - (weight - low) / span - even / 2);
    veil.data.set([...VEIL, Math.round(255 * dark)], 4 * place);
  });
  const small = document.createElement("canvas");
  small.width = columns;
  small.height = rows;
  small.getContext("2d").putImageData(veil, 0, 0);
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = true;
  pen.imageSmoothingQuality = "high";
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  pen.drawImage(small, 0, 0, columns, rows, 0, 0, canvas.width, canvas.height);
  return even;
}
