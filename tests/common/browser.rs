//! A headless Chromium on the network of a host, driven by the Chrome DevTools Protocol over a
//! pipe.

use super::lan::Host;
use super::{DEADLINE, directory, thread};
use data_encoding::BASE64;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Debian's package of the headless shell, and the full browser.
const PROGRAMS: [&str; 2] = ["chromium-headless-shell", "chromium"];

const FLAGS: [&str; 14] = [
    "--remote-debugging-pipe",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
];

/// A browser with one page. Dropping it ends the browser.
pub struct Browser {
    process: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    events: VecDeque<Value>,
    session: Option<String>,
    last_id: u64,
    profile: PathBuf,
    /// URLs of all requests of the page, in order.
    pub requested: Vec<String>,
    /// Errors of the page: uncaught exceptions, error log entries (also policy violations),
    /// dialogs.
    pub complaints: Vec<String>,
}

impl Browser {
    /// Starts a browser on the network of `host`, with additional flags.
    pub fn start(host: &Host, flags: &[&str]) -> Browser {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let profile = directory().join(format!("browser-{}-{number}", std::process::id()));
        fs::create_dir_all(&profile).expect("a directory for a browser");
        let program = PROGRAMS.into_iter().find(|name| Path::new("/usr/bin").join(name).exists());
        let program = program.expect("Chromium is installed: scripts/deps test");
        // With `--remote-debugging-pipe`, Chromium reads from descriptor 3 and writes to descriptor
        // 4.
        let script = "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1";
        let mut command = host.net_cmd("sh");
        command.args(["-c", script, "sh", program]).args(FLAGS).args(flags);
        command.arg(format!("--user-data-dir={}", profile.display())).arg("about:blank");
        command.env("HOME", &profile).env("TZ", "UTC");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().expect("nsenter starts");
        let to = process.stdin.take().expect("it was asked for");
        let output = BufReader::new(process.stdout.take().expect("it was asked for"));
        let (sender, from) = channel();
        thread::spawn("browser", move || {
            let messages = output.split(0).map_while(Result::ok);
            for message in messages.filter_map(|bytes| serde_json::from_slice(&bytes).ok()) {
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser = Browser {
            process,
            to,
            from,
            events: VecDeque::new(),
            session: None,
            last_id: 0,
            profile,
            requested: Vec::new(),
            complaints: Vec::new(),
        };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attached = browser.call(
            "Target.attachToTarget",
            json!({ "targetId": target["targetId"], "flatten": true }),
        );
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Network", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Calls a method of the DevTools protocol and returns its result. Panics if the method fails
    /// or does not answer within [`DEADLINE`].
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.last_id += 1;
        let id = self.last_id;
        let mut message = json!({ "id": id, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let bytes = [message.to_string().as_bytes(), b"\0"].concat();
        self.to.write_all(&bytes).expect("the browser is there");
        loop {
            let mut answer = self.receive(method);
            if answer["id"] == json!(id) {
                assert!(answer["error"].is_null(), "{method}: {}", answer["error"]);
                return answer["result"].take();
            }
        }
    }

    fn receive(&mut self, waiting_for: &str) -> Value {
        let message =
            self.from.recv_timeout(DEADLINE).unwrap_or_else(|e| panic!("{waiting_for}: {e}"));
        let parameters = &message["params"];
        match message["method"].as_str().unwrap_or_default() {
            "Network.requestWillBeSent" => {
                self.requested
                    .push(parameters["request"]["url"].as_str().unwrap_or_default().to_owned());
            }
            "Runtime.exceptionThrown" => {
                self.complaints.push(parameters["exceptionDetails"].to_string())
            }
            "Log.entryAdded" if parameters["entry"]["level"] == "error" => {
                self.complaints.push(parameters["entry"]["text"].to_string());
            }
            "Page.javascriptDialogOpening" => {
                self.complaints.push(parameters["message"].to_string())
            }
            _ => {}
        }
        if message.get("method").is_some() {
            self.events.push_back(message.clone());
        }
        message
    }

    fn wait_for_event(&mut self, method: &str) {
        loop {
            while let Some(event) = self.events.pop_front() {
                if event["method"] == method {
                    return;
                }
            }
            self.receive(method);
        }
    }

    /// Opens a URL and waits until the page is loaded.
    pub fn open(&mut self, url: &str) {
        self.events.clear();
        self.call("Page.navigate", json!({ "url": url }));
        self.wait_for_event("Page.loadEventFired");
    }

    /// Allows or forbids scripts, from the next page on.
    pub fn allow_scripts(&mut self, allowed: bool) {
        self.call("Emulation.setScriptExecutionDisabled", json!({ "value": !allowed }));
    }

    /// Evaluates an expression in the page and returns its value. Awaits a promise.
    pub fn value(&mut self, expression: &str) -> Value {
        let parameters =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let mut answer = self.call("Runtime.evaluate", parameters);
        assert!(
            answer["exceptionDetails"].is_null(),
            "{expression}: {}",
            answer["exceptionDetails"]
        );
        answer["result"]["value"].take()
    }

    /// Evaluates an expression in the page and returns its value. Panics if it is not a string.
    pub fn text(&mut self, expression: &str) -> String {
        self.value(expression)
            .as_str()
            .unwrap_or_else(|| panic!("{expression}: no text"))
            .to_owned()
    }

    /// The visible text of the element with this ID.
    pub fn shown(&mut self, id: &str) -> String {
        self.text(&format!("document.getElementById({id:?}).innerText"))
    }

    /// Waits until the element with this ID shows all `texts`, without reloading the page. Panics
    /// after [`DEADLINE`].
    pub fn wait_until_shown(&mut self, id: &str, texts: &[&str]) -> String {
        let until = Instant::now() + DEADLINE;
        loop {
            let shown = self.shown(id);
            if texts.iter().all(|text| shown.contains(text)) {
                return shown;
            }
            assert!(
                Instant::now() < until,
                "{id} does not show {texts:?} but {shown:?}; {:?}",
                self.complaints
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Presses and releases a key.
    pub fn press(&mut self, key: &str, code: u32) {
        for kind in ["rawKeyDown", "keyUp"] {
            let parameters =
                json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code });
            self.call("Input.dispatchKeyEvent", parameters);
        }
    }

    /// Sets the width of the viewport in pixels and the colour scheme (`light`, `dark`).
    pub fn look(&mut self, width: u32, scheme: &str) {
        let metrics =
            json!({ "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.call("Emulation.setDeviceMetricsOverride", metrics);
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.call("Emulation.setEmulatedMedia", features);
    }

    /// Writes a PNG of the whole page, or of its upper `height` pixels.
    pub fn picture(&mut self, file: &Path, height: Option<u32>) {
        let size = self.call("Page.getLayoutMetrics", json!({}))["cssContentSize"].take();
        let height = height.map_or(size["height"].clone(), Value::from);
        let clip = json!({ "x": 0, "y": 0, "width": size["width"], "height": height, "scale": 1 });
        let parameters = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        let answer = self.call("Page.captureScreenshot", parameters);
        let png =
            BASE64.decode(answer["data"].as_str().unwrap_or_default().as_bytes()).expect("base64");
        fs::create_dir_all(file.parent().expect("a file is in a directory"))
            .expect("a directory for pictures");
        fs::write(file, png).expect("a picture");
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // On `Browser.close`, Chromium ends its child processes and closes its files. `nsenter` and
        // the shell were replaced by it (`exec`), so `process` is Chromium itself.
        let close = json!({ "id": 0, "method": "Browser.close" }).to_string();
        let asked = self.to.write_all(&[close.as_bytes(), b"\0"].concat());
        let until = Instant::now() + Duration::from_secs(5);
        while asked.is_ok() && matches!(self.process.try_wait(), Ok(None)) && Instant::now() < until
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.profile);
    }
}
