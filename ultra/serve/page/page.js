// The page: frames of one exam in, a conversation about them out.
// It asks the endpoint it came from and nobody else, and keeps nothing beyond the tab.

const WORDS = {
  zh: {
    other: "English",
    title: "超声问答",
    notice: "研究工具，不是医疗器械：不得用于诊断、治疗或分诊。所选的帧可能有误，通顺的回答也可能是错的。",
    key: "API 密钥",
    keyHint: "如服务需要",
    keyAccepted: "✓ 有效",
    keyRefused: "✗ 无效",
    exam: "检查",
    remove: "移除此帧",
    clear: "新检查",
    strip: "各帧",
    legend: "条形：该帧在全部得分的 softmax 中所占的份额；数字：得分。橙色：模型选中的帧。",
    drop: "拖入或选择一次检查的各帧",
    dropMore: "添加更多帧",
    kinds: "JPEG、PNG、WebP 或 DICOM，也可粘贴",
    reading: "正在读取……",
    identity: "只放入已去标识的图像：JPEG、PNG、WebP 不检查其中的文字。DICOM 由服务裁剪到超声区域，不能证明不含文字的会被拒绝。",
    conversation: "对话",
    restart: "新对话",
    divider: "新对话",
    examples: "示例问题",
    question: "问题",
    questionHint: "用中文提问……",
    keys: "Enter 发送，Shift+Enter 换行，Esc 停止；在帧上用方向键移动，Delete 移除。",
    send: "提问",
    stop: "停止",
    frameOf: (n, count) => `第 ${n} 帧，共 ${count} 帧`,
    chosen: "被选中",
    scored: (score, share) => `得分 ${score}，份额 ${share}`,
    firstText: (s) => `首字 ${s} 秒`,
    total: (s) => `共 ${s} 秒`,
    tokens: (n, prompt) => `${n} 个词元（提示 ${prompt}）`,
    encoder: (name) => `编码副本 ${name}`,
    language: (name) => `语言副本 ${name}`,
    stopped: "已停止",
    length: "已达长度上限",
    noFrames: "请先放入检查的帧。",
    unreadable: (name) => `${name}：无法读取`,
    unknownKind: (name) => `${name}：不是 JPEG、PNG、WebP 或 DICOM`,
    tooMany: (count, most) => `${count} 帧；一次提问最多 ${most} 帧。`,
    tooLarge: (name, most) => `${name}：超过 ${most} MiB`,
    noKey: "需要有效的 API 密钥。",
    busy: (s) => `服务繁忙，请在 ${s} 秒后再试。`,
    refused: "请求被拒绝。",
    failed: "服务出错，回答未完成。",
    cut: "连接中断，回答不完整。",
    offline: "无法连接到服务。",
  },
  en: {
    other: "中文",
    title: "ask about an exam",
    notice: "A research tool, not a medical device: not for diagnosis, treatment or triage. The chosen frame can be wrong, and so can a fluent answer.",
    key: "API key",
    keyHint: "if one is needed",
    keyAccepted: "✓ accepted",
    keyRefused: "✗ refused",
    exam: "Exam",
    remove: "Remove frame",
    clear: "New exam",
    strip: "Frames",
    legend: "Bar: the frame's share in the softmax of all scores. Number: its score. Orange: the frame the model chose.",
    drop: "Drop or choose the frames of one exam",
    dropMore: "Add frames",
    kinds: "JPEG, PNG, WebP or DICOM; pasting works too",
    reading: "Reading…",
    identity: "De-identified images only: JPEG, PNG and WebP are not searched for text. DICOM is cropped to its ultrasound region by the endpoint and refused where it cannot be shown to hold no text.",
    conversation: "Conversation",
    restart: "New conversation",
    divider: "New conversation",
    examples: "Example questions",
    question: "Question",
    questionHint: "Ask in Chinese…",
    keys: "Enter sends, Shift+Enter starts a new line, Esc stops; on a frame the arrow keys move and Delete removes.",
    send: "Ask",
    stop: "Stop",
    frameOf: (n, count) => `Frame ${n} of ${count}`,
    chosen: "chosen",
    scored: (score, share) => `score ${score}, share ${share}`,
    firstText: (s) => `first text ${s} s`,
    total: (s) => `total ${s} s`,
    tokens: (n, prompt) => `${n} tokens (prompt ${prompt})`,
    encoder: (name) => `encoder replica ${name}`,
    language: (name) => `language replica ${name}`,
    stopped: "stopped",
    length: "longest answer reached",
    noFrames: "Add the frames of an exam first.",
    unreadable: (name) => `${name}: cannot be read`,
    unknownKind: (name) => `${name}: not a JPEG, PNG, WebP or DICOM`,
    tooMany: (count, most) => `${count} frames; a question is about ${most} at most.`,
    tooLarge: (name, most) => `${name}: more than ${most} MiB`,
    noKey: "A valid API key is needed.",
    busy: (s) => `The endpoint is busy; try again in ${s} s.`,
    refused: "The request was refused.",
    failed: "The endpoint failed, and the answer with it.",
    cut: "The connection broke; the answer is incomplete.",
    offline: "The endpoint cannot be reached.",
  },
};

// Asked as they are, since the model reads Chinese; the English is there to be understood.
const EXAMPLES = [
  ["请描述超声所见。", "Describe the findings."],
  ["超声提示是什么？", "What is the impression?"],
  ["病变是什么？", "What is the lesion?"],
  ["病变在哪一侧？", "On which side is it?"],
  ["病变有多大？", "How large is it?"],
  ["边界是否清晰？", "Is its margin clear?"],
];

const $ = (id) => document.getElementById(id);

let tongue = recall("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
let words = WORDS[tongue];
let model = null; // as the endpoint lists it, once asked
let frames = []; // {url, name, evidence}
let reading = 0; // lots of files on their way to become frames
let shown = 0; // the frame in the viewer
let verdict = null; // {chosen, scores} of these frames
let turns = []; // the conversation as the endpoint reads it
let exchanges = []; // the conversation as people read it
let trouble = null; // what went wrong with the files: words => text
let answering = null; // AbortController of the answer under way

// What lasts as long as the tab, where the browser allows even that.

function recall(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null;
  }
}

function remember(name, value) {
  try {
    sessionStorage.setItem(name, value);
  } catch {
    // It then lasts until the page is left.
  }
}

// Asking the endpoint

class Refused extends Error {
  // What to tell is a function of words, so that it follows the language; the detail is the
  // endpoint's own, and English.
  constructor(tell, detail = "", status = 0) {
    super(detail);
    this.tell = tell;
    this.status = status;
  }
}

async function call(path, options = {}) {
  const key = $("key").value.trim();
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused((w) => w.offline);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw explain(response.status, body?.error?.message, response.headers.get("Retry-After"));
}

function explain(status, detail, retryAfter) {
  let tell = (w) => (status < 500 ? w.refused : w.failed);
  if (status === 401) {
    showAccess("keyRefused");
    tell = (w) => w.noKey;
  }
  if (status === 404) model = null; // it may have another name by now
  if (status === 429) tell = (w) => w.busy(retryAfter ?? 5);
  return new Refused(tell, detail, status);
}

async function findModel() {
  if (model === null) {
    const { data } = await (await call("v1/models")).json();
    model = data[0];
    showAccess($("key").value.trim() ? "keyAccepted" : "");
  }
  return model;
}

async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = events.pop();
      for (const event of events) yield event.replace(/^data: /, "");
    }
  } finally {
    reader.cancel().catch(() => {}); // after an error the rest is of no use
  }
}

// Frames in

const KINDS = [
  ["image/jpeg", (head) => head.startsWith("\xff\xd8\xff")],
  ["image/png", (head) => head.startsWith("\x89PNG")],
  ["image/webp", (head) => head.startsWith("RIFF") && head.slice(8, 12) === "WEBP"],
  ["application/dicom", (head) => head.slice(128, 132) === "DICM"],
];

async function addFiles(files) {
  if (!files.length) return;
  stop();
  trouble = null;
  reading += 1;
  render();
  const troubles = [];
  await findModel().catch((error) => troubles.push(error)); // plain images are shown all the same
  for (const file of files.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }))) {
    try {
      frames = frames.concat(await readFile(file));
    } catch (error) {
      troubles.push(error);
    }
  }
  reading -= 1;
  if (troubles.length) trouble = (w) => troubles.map((t) => describe(t, w)).join("\n");
  changeFrames(shown);
  // Where there is no mouse there is a keyboard on the screen, and it would hide the frames.
  if (!troubles.length && matchMedia("(hover: hover)").matches) $("question").focus();
}

async function readFile(file) {
  const start = await file.slice(0, 132).arrayBuffer().catch(() => new ArrayBuffer(0));
  const head = String.fromCharCode(...new Uint8Array(start));
  const kind = KINDS.find(([, begins]) => begins(head))?.[0];
  if (kind === undefined) throw new Refused((w) => w.unknownKind(file.name));
  if (kind === "application/dicom") return readDicom(file, kind);
  const most = model?.ultra.max_image_mib ?? Infinity;
  if (file.size > most * 2 ** 20) throw new Refused((w) => w.tooLarge(file.name, most));
  const image = new Image();
  try {
    image.src = await toDataUrl(new Blob([file], { type: kind }));
    await image.decode();
  } catch {
    throw new Refused((w) => w.unreadable(file.name));
  }
  // The endpoint reads JPEG and PNG.
  return [{ url: kind === "image/webp" ? toPng(image) : image.src, name: file.name }];
}

async function readDicom(file, kind) {
  try {
    const options = { method: "POST", body: file, headers: { "Content-Type": kind } };
    const { data } = await (await call("v1/frames", options)).json();
    return data.map(({ url, source, evidence }) => ({ url, name: file.name + source, evidence }));
  } catch (error) {
    throw new Refused((w) => `${file.name}: ${error.tell(w)}`, error.message);
  }
}

function toDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

function toPng(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL("image/png");
}

// Another set of frames is another exam to the endpoint, so its conversation starts anew.
function changeFrames(show) {
  verdict = null;
  shown = Math.max(0, Math.min(show, frames.length - 1));
  const most = model?.ultra.max_frames ?? Infinity;
  if (frames.length > most) trouble = (w) => w.tooMany(frames.length, most);
  restart();
  drawStrip();
  render();
}

function removeFrame(index) {
  stop();
  trouble = null;
  frames = frames.filter((_, i) => i !== index);
  changeFrames(index);
  (strip().at(shown) ?? $("drop")).focus();
}

function restart() {
  stop();
  if (turns.length) exchanges.push({ divider: true });
  turns = [];
}

// Questions and answers

async function ask(text) {
  // Frames still being read would take the question for one about other frames.
  if (answering || reading || !text) return;
  if (!frames.length) {
    trouble = (w) => w.noFrames;
    render();
    $("drop").focus();
    return;
  }
  const exchange = { question: text, answer: "", state: "busy" };
  const messages = [...turns, { role: "user", content: turns.length ? text : openWith(text) }];
  const before = turns;
  const abort = new AbortController();
  exchanges.push(exchange);
  answering = abort;
  if ($("question").value.trim() === text) $("question").value = "";
  render();
  try {
    await answer(exchange, messages, abort.signal);
    exchange.state = "done";
  } catch (error) {
    settle(exchange, error);
  }
  // What was stopped stays said, unless the conversation has gone.
  if (turns === before && exchange.answer && exchange.state !== "failed") {
    turns = [...messages, { role: "assistant", content: exchange.answer }];
  }
  if (answering === abort) answering = null;
  render();
}

function openWith(question) {
  const images = frames.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return [...images, { type: "text", text: question }];
}

async function answer(exchange, messages, signal) {
  const about = frames;
  const { id } = await findModel();
  const body = { model: id, messages, stream: true, stream_options: { include_usage: true } };
  const start = performance.now();
  const seconds = () => (performance.now() - start) / 1000;
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  let done = false;
  for await (const event of readEvents(response.body)) {
    done ||= event === "[DONE]";
    if (!done) take(exchange, JSON.parse(event), seconds(), about);
  }
  if (!done) throw new Refused((w) => w.cut);
  exchange.total = seconds();
}

function take(exchange, chunk, seconds, about) {
  if (chunk.error) throw new Refused((w) => w.failed, chunk.error.message);
  if (chunk.ultra) {
    exchange.replicas = chunk.ultra.replicas;
    if (about === frames) {
      verdict = { chosen: chunk.ultra.chosen_frame, scores: chunk.ultra.scores };
      shown = verdict.chosen;
    }
  }
  const [choice] = chunk.choices;
  if (choice?.delta.content) {
    exchange.firstText ??= seconds;
    exchange.answer += choice.delta.content;
  }
  if (choice?.finish_reason) exchange.finish = choice.finish_reason;
  if (chunk.usage) exchange.usage = chunk.usage;
  render();
}

function settle(exchange, error) {
  if (error.name === "AbortError") {
    exchange.state = "stopped";
    return;
  }
  if (!(error instanceof Refused)) error = new Refused((w) => w.cut, error.message);
  exchange.state = "failed";
  exchange.error = error;
  if (!$("question").value) $("question").value = exchange.question; // to be sent again
  if (error.status === 401) $("key").focus();
}

function stop() {
  answering?.abort();
  answering = null;
}

// What is seen

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

function describe(error, w) {
  return [error.tell?.(w) ?? w.failed, error.message].filter(Boolean).join("\n");
}

// Writing the same again would end a selection and be read aloud once more.
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function strip() {
  return [...$("strip").querySelectorAll(".frame")];
}

function drawStrip() {
  $("strip").replaceChildren(
    ...frames.map(({ url }, index) => {
      const image = make("img", "");
      image.src = url;
      image.alt = "";
      const track = make("span", "track", make("span", "fill"));
      const number = make("span", "number", `${index + 1}`);
      const button = make("button", "frame", image, number, track, make("span", "score"));
      button.type = "button";
      button.addEventListener("click", () => show(index));
      button.addEventListener("keydown", (event) => moveOnStrip(event, index));
      return make("li", "", button);
    }),
  );
}

function show(index) {
  shown = index;
  render();
}

function moveOnStrip(event, index) {
  const last = frames.length - 1;
  const targets = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: last };
  if (event.key === "Delete") removeFrame(index);
  else if (event.key in targets) {
    show(Math.max(0, Math.min(targets[event.key], last)));
    strip()[shown].focus();
  } else return;
  event.preventDefault();
}

function shares(scores) {
  const most = Math.max(...scores);
  const weights = scores.map((score) => Math.exp(score - most));
  const sum = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => weight / sum);
}

function percent(share) {
  return `${Math.round(share * 100)}%`;
}

function nameFrame(index) {
  const parts = [words.frameOf(index + 1, frames.length)];
  if (verdict) {
    if (index === verdict.chosen) parts.push(words.chosen);
    const share = percent(shares(verdict.scores)[index]);
    parts.push(words.scored(verdict.scores[index].toFixed(2), share));
  }
  return parts.join(" · ");
}

function renderFrames() {
  const some = frames.length > 0;
  document.body.classList.toggle("empty", !some);
  for (const id of ["viewer", "strip", "remove", "clear"]) $(id).hidden = !some;
  $("legend").hidden = verdict === null;
  document.body.classList.toggle("reading", reading > 0);
  $("drop").disabled = reading > 0;
  $("drop-title").textContent = reading ? words.reading : some ? words.dropMore : words.drop;
  $("trouble").hidden = trouble === null;
  write($("trouble"), trouble?.(words) ?? "");
  const share = verdict && shares(verdict.scores);
  strip().forEach((button, index) => {
    button.classList.toggle("chosen", index === verdict?.chosen);
    button.setAttribute("aria-pressed", index === shown);
    button.setAttribute("aria-label", nameFrame(index));
    button.tabIndex = index === shown ? 0 : -1;
    button.querySelector(".track").hidden = button.querySelector(".score").hidden = !verdict;
    button.style.setProperty("--share", verdict ? percent(share[index]) : "0");
    button.querySelector(".score").textContent = verdict?.scores[index].toFixed(2) ?? "";
  });
  if (!some) return;
  const { url, name, evidence } = frames[shown];
  if ($("view").src !== url) $("view").src = url;
  $("view").alt = nameFrame(shown);
  $("viewer").classList.toggle("chosen", shown === verdict?.chosen);
  $("caption").textContent = [nameFrame(shown), name, evidence].filter(Boolean).join(" · ");
}

function facts(exchange) {
  const { firstText, total, usage, replicas, state, finish } = exchange;
  return [
    firstText !== undefined && words.firstText(firstText.toFixed(2)),
    total !== undefined && words.total(total.toFixed(2)),
    usage && words.tokens(usage.completion_tokens, usage.prompt_tokens),
    replicas?.encoder && words.encoder(replicas.encoder),
    replicas?.language && words.language(replicas.language),
    state === "stopped" && words.stopped,
    finish === "length" && words.length,
  ].filter(Boolean);
}

function drawExchange() {
  const error = make("p", "trouble");
  error.setAttribute("role", "alert");
  const answer = make("p", "answer");
  answer.lang = "zh-CN";
  return make("li", "", make("p", "asked"), answer, error, make("p", "facts"));
}

function renderExchange(item, exchange) {
  if (exchange.divider) {
    item.className = "divider";
    write(item, words.divider);
    return;
  }
  const [asked, answer, error, detail] = item.children;
  item.setAttribute("aria-busy", exchange.state === "busy");
  write(asked, exchange.question);
  write(answer, exchange.answer);
  error.hidden = !exchange.error;
  write(error, exchange.error ? describe(exchange.error, words) : "");
  const known = facts(exchange);
  if (known.join() !== [...detail.children].map((fact) => fact.textContent).join()) {
    detail.replaceChildren(...known.map((fact) => make("span", "", fact)));
  }
}

function renderConversation() {
  const talk = $("talk");
  const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
  const isNew = talk.children.length < exchanges.length;
  exchanges.forEach((exchange, index) => {
    renderExchange(talk.children[index] ?? talk.appendChild(drawExchange()), exchange);
  });
  if (isNew) talk.lastChild.scrollIntoView({ block: "nearest" });
  else if (atEnd) talk.scrollTop = talk.scrollHeight;
  $("restart").hidden = turns.length === 0;
  $("send").hidden = answering !== null;
  $("stop").hidden = answering === null;
  const waits = answering !== null || reading > 0;
  for (const button of [$("send"), ...document.querySelectorAll(".example")]) button.disabled = waits;
}

function showAccess(word) {
  $("access-state").dataset.word = word;
  $("access-state").textContent = words[word] ?? "";
}

function renderWords() {
  document.documentElement.lang = tongue === "zh" ? "zh-CN" : "en";
  document.title = `ultra · ${words.title}`;
  for (const element of document.querySelectorAll("[data-text]")) {
    element.textContent = words[element.dataset.text];
  }
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", words[element.dataset.label]);
  }
  for (const element of document.querySelectorAll("[data-hint]")) {
    element.placeholder = words[element.dataset.hint];
  }
  $("language").textContent = words.other;
  $("language").lang = tongue === "zh" ? "en" : "zh-CN";
  showAccess($("access-state").dataset.word ?? "");
  $("examples").replaceChildren(
    ...EXAMPLES.map(([question, meaning]) => {
      const button = make("button", "example", question);
      button.type = "button";
      button.lang = "zh-CN";
      if (tongue === "en") {
        button.append(make("small", "", meaning));
        button.lastChild.lang = "en";
      }
      button.addEventListener("click", () => ask(question));
      return button;
    }),
  );
}

function render() {
  renderFrames();
  renderConversation();
}

// What people do

$("language").addEventListener("click", () => {
  tongue = tongue === "zh" ? "en" : "zh";
  words = WORDS[tongue];
  remember("language", tongue);
  renderWords();
  render();
});

async function checkKey() {
  remember("key", $("key").value.trim());
  model = null;
  trouble = null;
  await findModel().catch((error) => (trouble = (w) => describe(error, w)));
  render();
}

$("key").addEventListener("change", checkKey);
$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  $("key").blur(); // which is a change, if it is one
});

$("drop").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", async () => {
  await addFiles([...$("files").files]);
  $("files").value = ""; // the same file can be chosen again
});
$("remove").addEventListener("click", () => removeFrame(shown));
$("clear").addEventListener("click", () => {
  stop();
  frames = [];
  exchanges = [];
  turns = [];
  trouble = null;
  $("talk").replaceChildren();
  changeFrames(0);
  $("drop").focus();
});

// The whole page takes a drop: missing the zone would otherwise leave it for the file.
for (const kind of ["dragenter", "dragover"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  });
}
addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  addFiles([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) addFiles([...event.clipboardData.files]);
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});

$("restart").addEventListener("click", () => {
  restart();
  render();
  $("question").focus();
});
$("stop").addEventListener("click", stop);
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask($("question").value.trim());
});
// Enter that ends the writing of a Chinese word is not meant for the question; Safari says so by 229.
const isComposing = (event) => event.isComposing || event.keyCode === 229;
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || isComposing(event)) return;
  event.preventDefault();
  $("composer").requestSubmit();
});

$("key").value = recall("key") ?? "";
renderWords();
render();
