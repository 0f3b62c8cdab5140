// A page that is opened from a folder may start no worker: the script of the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  const load = (page, url) =>
    new Promise((onload, fail) => {
      const onerror = () => fail(new Error(`no script at ${url}`));
      page.body.append(Object.assign(page.createElement("script"), { src: url, onload, onerror }));
    });

  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = Object.assign(document.createElement("iframe"), { hidden: true });
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.inside.importScripts = async (...urls) => {
        for (const each of urls) await load(this.inside.document, each);
      };
      this.ready = load(this.inside.document, url);
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
