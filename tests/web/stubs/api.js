/* The page's `api`: events that tests send, and requests that are kept and answered by `api.answers`. */
class Api extends EventTarget {
  requests = [];
  answers = {};

  async fetchApi(path, options = {}) {
    this.requests.push({ path, ...options });
    const answer = this.answers[path.split("?")[0]];
    return { ok: answer !== undefined, json: async () => answer };
  }

  send(event, detail) { this.dispatchEvent(new CustomEvent(event, { detail })); }
}

export const api = new Api();
