/* What is said about the files of a known model: pure functions of what GET /diffsynth_backend/models answers. */

const WORDS = {
  en: { about: "about", missing: "missing", here: "complete", download: "Download", title: "Download models?",
    off: "Downloads are off. Switch them on in Settings, DiffSynth, Downloads.",
    question: (name, what, licences) => `${name}: download ${what} from a model hub? Licence: ${licences}.`,
    queued: "waiting for its turn", failed: "The server refused:" },
  zh: { about: "约", missing: "缺少", here: "完整", download: "下载", title: "下载模型?",
    off: "下载已关闭,请在“设置 → DiffSynth”中开启。",
    question: (name, what, licences) => `${name}:从模型站下载 ${what}?许可证:${licences}。`,
    queued: "排队中", failed: "服务器拒绝:" },
};

export const words = (locale) => WORDS[String(locale).split("-")[0]] ?? WORDS.en;

export function gigabytes(bytes) {
  const [unit, factor] = [["GB", 1e9], ["MB", 1e6], ["KB", 1e3]].find(([, size]) => bytes >= size) ?? ["bytes", 1];
  return factor === 1 ? `${bytes} bytes` : `${(bytes / factor).toFixed(1)} ${unit}`;
}

export const missingParts = (state) => state.parts.filter((part) => part.bytes === null);

/* The lines below a node: what it is and how large, then what is here and what is not. */
export function summary(state, say) {
  const size = state.bytes ? `${say.about} ${gigabytes(state.bytes)}` : null;
  const first = [state.title, size, ...state.licences].filter(Boolean).join(" · ");
  const here = state.parts.filter((part) => part.bytes !== null).map((part) => `✓ ${part.title} ${gigabytes(part.bytes)}`);
  const missing = missingParts(state).map((part) => part.title);
  const last = missing.length ? `✗ ${say.missing}: ${missing.join(", ")}` : say.here;
  return [first, here.join(" · "), last].filter(Boolean).join("\n");
}

/* The question before a download where the setting is "ask". */
export function question(state, say) {
  const what = missingParts(state).map((part) => `${part.title} (${part.model_id}: ${part.pattern})`).join(", ");
  return say.question(state.title, what, state.licences.join(", "));
}

/* A prompt of one node, which has the id of the node that shows the progress. `confirmed` stands beside the workflow. */
export function prompt(clientId, nodeId, state) {
  const node = { class_type: "DiffSynthBackend_DownloadModels", inputs: { model: state.name } };
  return { client_id: clientId, prompt: { [nodeId]: node },
    extra_data: state.policy === "ask" ? { diffsynth_download: state.name } : {} };
}
