// Tells of changes as they happen: by the service's events, and by the clock where these do not get through.

const POLL_MS = 4000;
const RETRY_MS = 60_000;
const FIRST_WORD_MS = 5000; // a proxy that holds the stream back lets nothing through at all
const SILENCE_MS = 45_000; // three heartbeats of the service

/**
 * Calls `changed` after changes of what the events at `path` speak of, until the signal aborts.
 *
 * @param last The newest event that is known already; without it the first one that comes counts as a change.
 */
export async function follow(path, headers, changed, signal, last = null) {
  let fails = false;
  const look = inTurn(changed, signal);
  const seen = (id, isChange) => {
    last = id ?? last;
    if (isChange) look();
  };
  while (!signal.aborted) {
    const wasHidden = document.hidden;
    await visible(signal);
    if (wasHidden && fails) await look(); // no stream will tell what was missed
    const heard = signal.aborted || (await listen(path, { ...headers, ...(last ? { "Last-Event-ID": last } : {}) }, seen, signal));
    fails = !heard;
    const until = performance.now() + (fails ? RETRY_MS : 0);
    do {
      await pause(fails ? POLL_MS : 500, signal);
      if (signal.aborted || document.hidden) break;
      await look();
    } while (performance.now() < until);
  }
}

/** One look after another, each followed by a rest of its own length; whatever comes up meanwhile is one more. */
function inTurn(changed, signal) {
  let looking = null;
  let isDue = false;
  return () => {
    isDue = true;
    looking ??= (async () => {
      while (isDue && !signal.aborted) {
        isDue = false;
        const began = performance.now();
        await changed();
        await pause(performance.now() - began, signal);
      }
      looking = null;
    })();
    return looking;
  };
}

/** Whether anything was heard before the stream ended. */
async function listen(path, headers, seen, signal) {
  const ending = new AbortController();
  const end = () => ending.abort();
  const hide = () => document.hidden && end(); // a browser holds few connections open, and hidden pages need none
  document.addEventListener("visibilitychange", hide);
  signal.addEventListener("abort", end);
  let heard = false;
  let timer = setTimeout(end, FIRST_WORD_MS);
  try {
    const reply = await fetch(path, { headers: { ...headers, Accept: "text/event-stream" }, signal: ending.signal });
    if (!reply.ok || !reply.headers.get("content-type")?.startsWith("text/event-stream")) return false;
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ; ) {
      const { done, value } = await reader.read();
      if (done) return heard;
      heard = true;
      clearTimeout(timer);
      timer = setTimeout(end, SILENCE_MS);
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: ?(.*)/s)));
        seen(fields.id, fields.data !== undefined);
      }
    }
  } catch {
    return heard || document.hidden;
  } finally {
    clearTimeout(timer);
    end();
    document.removeEventListener("visibilitychange", hide);
    signal.removeEventListener("abort", end);
  }
}

const once = (target, name, signal) => new Promise((done) => {
  target.addEventListener(name, done, { once: true });
  signal.addEventListener("abort", done, { once: true });
});
const pause = (milliseconds, signal) => new Promise((done) => {
  const end = () => {
    clearTimeout(timer);
    signal.removeEventListener("abort", end);
    done();
  };
  const timer = setTimeout(end, milliseconds);
  signal.addEventListener("abort", end);
});

async function visible(signal) {
  while (document.hidden && !signal.aborted) await once(document, "visibilitychange", signal);
}
