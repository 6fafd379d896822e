// Asks for what the view of a run shows before the modules are there that draw it: `ask` takes the replies from here.

const early = new Map(); // path -> the reply that will come

function authorization() {
  const key = sessionStorage.getItem("evenodds-key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function askEarly(hash) {
  const run = /^#\/?runs\/([^/?]+)(?:\?|$)/.exec(hash)?.[1];
  if (!run) return;
  for (const path of [`runs/${run}`, `runs/${run}/report`, `runs/${run}/refits`]) {
    const reply = fetch(path, { headers: { Accept: "application/json", ...authorization() } });
    reply.catch(() => null); // whoever takes it is told
    early.set(path, reply);
  }
}
askEarly(location.hash);
