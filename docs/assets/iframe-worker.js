// Browsers refuse web workers to pages that are opened from disk; there the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      this.inside = this.frame.contentWindow
      this.inside.document.open()
      this.inside.document.close()
      this.inside.postMessage = data => setTimeout(() => this.onmessage?.({data}))
      const script = this.inside.document.createElement("script")
      this.ready = new Promise(loaded => { script.onload = loaded })
      script.onerror = event => this.onerror?.(event)
      script.src = url
      this.inside.document.body.append(script)
    }

    postMessage(data) {
      this.ready.then(() => this.inside.onmessage({data: structuredClone(data)}))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
