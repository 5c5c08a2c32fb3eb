/** The page: an image, a question, the answer, and the tiles that were encoded for it. */

const BLUE = "#2563eb";
const MAX_SIDE = 640; // px of the picture

const [form, file, question, dense, button] = ["form", "#file", "#question", "#dense", "button"].map((name) =>
  document.querySelector(name),
);
const [view, status, rows] = ["canvas", "[role=status]", "tbody"].map((name) => document.querySelector(name));

const given = new URLSearchParams(location.search);
const option = (name) => given.get(name) ?? document.body.dataset[name];

let model;
let image; // its bitmap, and its pixels for the model

function say(text, isError = false) {
  status.textContent = text;
  status.className = isError ? "error" : "";
}

/** Run an action, and show its error in one line. */
async function attempt(action) {
  file.disabled = button.disabled = true;
  try {
    await action();
  } catch (error) {
    say(error.message, true);
  }
  file.disabled = button.disabled = !model;
}

async function load() {
  if (typeof WebAssembly === "undefined") throw new Error("This browser has no WebAssembly: use another one.");
  say("Loading …");
  const { QGSAModel } = await import("./model.js").catch((error) => {
    throw new Error(`transformers.js could not be loaded: ${error.message}`);
  });
  const options = { variant: option("variant"), device: option("device"), onProgress: say };
  model = await QGSAModel.load(option("model"), options);
  if (given.has("question")) question.value = given.get("question");
  if (given.has("image")) await show(await (await fetch(given.get("image"))).blob());
  say("Choose an image and ask.");
}

async function show(blob) {
  const { readPixels } = await import("./inputs.js");
  const bitmap = await createImageBitmap(blob).catch(() => {
    throw new Error("image: this file cannot be read as an image");
  });
  image = { bitmap, pixels: await readPixels(blob) };
  draw();
}

/** Draw the image; with an answer, tiles that were not encoded in grey, and outlines around the others. */
function draw(answer) {
  const { bitmap } = image;
  const scale = MAX_SIDE / Math.max(bitmap.width, bitmap.height);
  view.width = Math.max(Math.round(bitmap.width * scale), 1);
  view.height = Math.max(Math.round(bitmap.height * scale), 1);
  const context = view.getContext("2d");
  context.drawImage(bitmap, 0, 0, view.width, view.height);
  if (!answer) return;
  const [rows, columns] = answer.grid;
  const [width, height] = [view.width / columns, view.height / rows];
  const boxes = answer.tiles.slice(0, -1).map((encoded, tile) => {
    return { encoded, box: [(tile % columns) * width, Math.floor(tile / columns) * height, width, height] };
  });
  context.fillStyle = "rgb(128 128 128 / 60%)";
  for (const { encoded, box } of boxes) if (!encoded) context.fillRect(...box);
  context.strokeStyle = BLUE;
  context.lineWidth = 4;
  for (const { encoded, box } of boxes) {
    const [left, top] = box;
    if (encoded) context.strokeRect(left + 2, top + 2, width - 4, height - 4);
  }
}

async function ask(selection) {
  const began = performance.now();
  const answer = await model.generate(image.pixels, question.value.trim(), { selection, onProgress: say });
  const seconds = (performance.now() - began) / 1000;
  const tiles = answer.tiles.slice(0, -1);
  const count = (each) => `${each.filter(Boolean).length} of ${each.length}`;
  const row = rows.insertRow(0);
  const system = selection === "dense" ? "every tile" : "QGSA";
  const cells = [question.value, system, answer.text, count(tiles), count(answer.kept), seconds.toFixed(2)];
  for (const cell of cells) row.insertCell().textContent = cell;
  return answer;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(async () => {
    if (!image) throw new Error("image is missing: choose one");
    if (!question.value.trim()) throw new Error("question is missing: write one");
    draw(await ask());
    if (dense.checked) await ask("dense");
    say("Done.");
  });
});
file.addEventListener("change", () => file.files.length && attempt(() => show(file.files[0])));

attempt(load);
