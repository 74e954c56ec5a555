/* Search of a site that is opened from the file system, where browsers allow no workers: a frame stands in. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = `<script src="${url}"><\/script>`;
      this.ready = new Promise((resolve) => frame.addEventListener("load", () => resolve(frame.contentWindow)));
      this.ready.then((inner) => {
        inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", {data}));
      });
      document.body.append(frame);
    }
    postMessage(data) {
      this.ready.then((inner) => inner.dispatchEvent(new MessageEvent("message", {data})));
    }
  };
}
