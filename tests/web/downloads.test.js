/* The files of a known model below a node: what is said, who is asked, and what is queued. */
import { beforeEach, expect, test, vi } from "vitest";
import { api } from "./stubs/api.js";
import { app } from "./stubs/app.js";
import { makeNode } from "./helpers.js";
import { gigabytes, prompt, question, summary, words } from "../../web/js/download_words.js";
import "../../web/js/downloads.js";

const LOADER = "DiffSynthBackend_ModelLoader";
const extension = app.extensions.find(({ name }) => name === "DiffSynthBackend.Downloads");
const PARTS = [{ title: "vae", bytes: 253_800_000, model_id: "Qwen/Qwen-Image", pattern: "vae/x.safetensors" },
  { title: "transformer", bytes: null, model_id: "Qwen/Qwen-Image", pattern: "transformer/*.safetensors" }];
const state = (policy) => ({ name: "qwen-image", title: "Qwen-Image", policy, bytes: 57.7e9, licences: ["Apache-2.0"],
  parts: PARTS });

let node, locale;
const box = () => node.widgets.find(({ name }) => name === "files")?.element;
const text = () => box().querySelector("pre").textContent;
const button = () => box().querySelector("button");
const line = () => box().querySelector(".diffsynth-download").textContent;
const settle = () => vi.waitFor(() => expect(api.pending ?? 0).toBe(0)).then(() => new Promise((go) => setTimeout(go)));

async function create(answer, type = LOADER) {
  api.answers = { "/diffsynth_backend/models": answer, "/prompt": { prompt_id: "p1" } };
  node = makeNode(type, { model: "qwen-image" }, { id: 7, comfyClass: type });
  extension.nodeCreated(node);
  await settle();
}

const queued = () => api.requests.filter(({ path }) => path === "/prompt").map(({ body }) => JSON.parse(body));

beforeEach(() => {
  locale = "en";
  api.requests = [];
  api.clientId = "me";
  app.ui = { settings: { getSettingValue: () => locale } };
  app.extensionManager.dialog = { confirm: vi.fn(async () => true) };
  app.graph = { getNodeById: (id) => (Number(id) === 7 ? node : null) };
});

test("sizes", () => {
  expect([57.7e9, 2.5e6, 1000, 12].map(gigabytes)).toEqual(["57.7 GB", "2.5 MB", "1.0 KB", "12 bytes"]);
});

test("what is here, what is not, and the licence", () => {
  expect(summary(state("off"), words("en"))).toBe(
    "Qwen-Image · about 57.7 GB · Apache-2.0\n✓ vae 253.8 MB\n✗ missing: transformer");
  const whole = { ...state("off"), bytes: null, parts: [PARTS[0]] };
  expect(summary(whole, words("zh-CN"))).toBe("Qwen-Image · Apache-2.0\n✓ vae 253.8 MB\n完整");
  expect(words("fr")).toBe(words("en"));
});

test("the question names files, owner and licence", () => {
  for (const part of ["transformer/*.safetensors", "Qwen/Qwen-Image", "Apache-2.0"])
    for (const language of ["en", "zh"]) expect(question(state("ask"), words(language))).toContain(part);
});

test("the user's word stands beside the workflow, and only if one was asked", () => {
  expect(prompt("me", "7", state("ask"))).toEqual({ client_id: "me", extra_data: { diffsynth_download: "qwen-image" },
    prompt: { 7: { class_type: "DiffSynthBackend_DownloadModels", inputs: { model: "qwen-image" } } } });
  expect(prompt("me", "7", state("known")).extra_data).toEqual({});
});

test("both languages have the same words", () => {
  expect(Object.keys(words("zh"))).toEqual(Object.keys(words("en")));
});

test("names of files are set as text", async () => {
  await create({ ...state("off"), title: "<img src=x onerror=alert(1)>" });
  expect(text()).toContain("<img src=x");
  expect(box().querySelector("img")).toBe(null);
});

test("nothing is shown for what nobody can download", async () => {
  await create(null);
  expect(box()).toBe(undefined);
});

test("another choice shows its own files, and none hides them", async () => {
  await create(state("off"));
  api.answers["/diffsynth_backend/models"] = null;
  node.widgets[0].value = "demo";
  node.widgets[0].callback("demo");
  await settle();
  expect(box().hidden).toBe(true);
  expect(api.requests.at(-1).path).toBe("/diffsynth_backend/models?name=demo");
});

test("a complete model has no button", async () => {
  await create({ ...state("known"), parts: [PARTS[0]] });
  expect(button().style.display).toBe("none");
});

test("off: the button says where to switch it on, and queues nothing", async () => {
  await create(state("off"));
  button().click();
  await settle();
  expect(line()).toContain("Settings, DiffSynth, Downloads");
  expect(queued()).toEqual([]);
});

test("ask: queued after a yes, not after a no", async () => {
  await create(state("ask"));
  app.extensionManager.dialog.confirm.mockResolvedValueOnce(false);
  button().click();
  await settle();
  expect(queued()).toEqual([]);
  button().click();
  await settle();
  expect(queued()).toEqual([prompt("me", "7", state("ask"))]);
  expect(line()).toBe("waiting for its turn");
});

test("known: queued at once; how far it is, and then what is here", async () => {
  await create(state("known"));
  button().click();
  await settle();
  expect(app.extensionManager.dialog.confirm).not.toHaveBeenCalled();
  extension.setup();
  api.send("diffsynth.download", { node: "7", text: "model.safetensors · 1 GB of 2 GB" });
  expect(line()).toContain("1 GB of 2 GB");
  api.answers["/diffsynth_backend/models"] = { ...state("known"), parts: [PARTS[0]] };
  api.send("execution_success", { prompt_id: "p1" });
  await settle();
  expect(line()).toBe("");
  expect(text()).toContain("complete");
});

test("an error is shown below the node that asked", async () => {
  await create(state("known"));
  button().click();
  await settle();
  api.send("execution_error", { prompt_id: "p1", exception_message: "the disk is full" });
  await settle();
  expect(line()).toBe("the disk is full");
});
