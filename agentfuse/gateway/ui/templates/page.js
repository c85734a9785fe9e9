
"use strict";
// All that the page does beyond HTML: the reader's own time, uploads with progress, what arrives, live.
const localise = (root) => {
  const say = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
  for (const each of root.querySelectorAll("time:not([title])")) {
    each.title = each.textContent;
    each.textContent = say.format(new Date(each.dateTime));
  }
};
const parsed = (html) => {
  const template = document.createElement("template");
  template.innerHTML = html; // rendered and escaped by the server
  localise(template.content);
  return template.content;
};
localise(document);

for (const form of document.querySelectorAll("form.upload")) {
  const input = form.querySelector("input[type=file]");
  const bar = form.querySelector("progress");
  const said = form.querySelector("[role=status]");
  const button = form.querySelector("button");
  const send = (files) => {
    if (!files.length) return;
    const body = new FormData();
    for (const file of files) body.append("files", file);
    const request = new XMLHttpRequest();
    const tell = (text, isBad) => {
      said.textContent = text;
      said.classList.toggle("bad", isBad);
    };
    const fail = (text) => {
      tell(text, true);
      bar.hidden = true;
      button.disabled = false;
      input.focus();
    };
    request.upload.onprogress = (event) => {
      bar.max = event.total;
      bar.value = event.loaded;
      const percent = Math.floor((100 * event.loaded) / event.total);
      tell(event.loaded < event.total ? `${percent} % sent` : "Sent; it is being stored", false);
    };
    request.onload = () => {
      if (request.status >= 200 && request.status < 300) location.assign(request.responseURL);
      else fail(request.response?.querySelector("#problem")?.textContent || `It failed (${request.status}).`);
    };
    request.onerror = () => fail("The connection broke; nothing is lost, try again.");
    request.responseType = "document";
    request.open("POST", form.action);
    request.send(body);
    bar.hidden = false;
    button.disabled = true;
    tell("Sending", false);
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(input.files);
  });
  form.addEventListener("dragover", (event) => {
    event.preventDefault();
    form.classList.add("over");
  });
  form.addEventListener("dragleave", () => form.classList.remove("over"));
  form.addEventListener("drop", (event) => {
    event.preventDefault();
    form.classList.remove("over");
    send(event.dataTransfer.files);
  });
}

const live = document.querySelector("[data-arrivals]");
if (live) {
  const rows = live.querySelector("tbody");
  const spoken = document.querySelector("#spoken");
  let source = null;
  let since = live.dataset.since;
  const arrived = (event) => {
    const { row, text } = JSON.parse(event.data);
    since = event.lastEventId;
    live.querySelector(".empty")?.closest("tr").remove();
    rows.prepend(parsed(row));
    rows.firstElementChild.classList.add("new");
    while (rows.children.length > 100) rows.lastElementChild.remove();
    spoken.textContent = text;
  };
  const changed = (event) => {
    for (const [id, html] of Object.entries(JSON.parse(event.data))) {
      const place = document.getElementById(id);
      if (place && !place.contains(document.activeElement)) place.replaceChildren(parsed(html));
    }
  };
  const listen = () => {
    source?.close();
    if (document.hidden) return; // a browser has six connections for all its tabs
    source = new EventSource(`${live.dataset.arrivals}?since=${since}`);
    source.addEventListener("arrival", arrived);
    source.addEventListener("state", changed);
    source.addEventListener("end", () => {
      source.close();
      if (!document.querySelector("form.upload progress:not([hidden])")) location.reload();
    });
  };
  document.addEventListener("visibilitychange", listen);
  listen();
}

for (const place of document.querySelectorAll("[data-fragment]")) {
  fetch(place.dataset.fragment)
    .then((answer) => (answer.ok ? answer.text() : ""))
    .then((html) => place.replaceChildren(parsed(html)));
}
