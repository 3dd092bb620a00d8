//! A browser, driven by the WebDriver protocol (W3C): JSON over HTTP to a `chromedriver` that is started for the test and
//! ends with it. Waiting is done inside the page, picture by picture, with a deadline.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

/// How long a condition may take to become true.
const DEADLINE: Duration = Duration::from_secs(90);
/// How long the driver may take to answer anything.
const ANSWER: Duration = Duration::from_secs(120);
/// Bytes of one answer of the driver: its logs are long.
const MOST_BYTES: u64 = 256 << 20;

/// Keys as WebDriver names them.
pub mod key {
    pub const TAB: &str = "\u{e004}";
    pub const ENTER: &str = "\u{e007}";
    pub const ESCAPE: &str = "\u{e00c}";
    pub const LEFT: &str = "\u{e012}";
}

/// Drivers that are started until one listens.
const DRIVERS: usize = 5;

/// What steers a browser.
struct Driver {
    process: Child,
    port: String,
}

impl Driver {
    /// Starts one. `None` if it ends before it listens; what it `said` is added.
    fn start(program: &str, said: &mut Vec<String>) -> std::io::Result<Option<Self>> {
        let mut command = Command::new(program);
        command.arg("--port=0").stdin(Stdio::null());
        let mut process = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        let port = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let port = line.split_once("successfully on port ");
            let port = port.map(|(_, port)| port.trim_end_matches('.').to_owned());
            said.push(line);
            port
        });
        let Some(port) = port else {
            process.wait()?;
            return Ok(None);
        };
        // Whatever it prints later must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Some(Self { process, port }))
    }
}

/// A browser with one window.
pub struct Browser {
    driver: Child,
    session: String,
    agent: ureq::Agent,
    _profile: TempDir,
}

impl Browser {
    /// A browser with an empty profile. `None`, said on stderr, where there is none and none is demanded by
    /// `COHORT_REQUIRE_BROWSER=1`.
    pub fn start() -> Option<Self> {
        let driver = std::env::var("COHORT_CHROMEDRIVER").unwrap_or("chromedriver".into());
        let mut said = Vec::new();
        // It takes a free port of one address family and then the same one of the other, where it may be taken; it then
        // ends, and another one finds another port.
        let started = (0..DRIVERS).find_map(|_| Driver::start(&driver, &mut said).transpose());
        match started.unwrap_or_else(|| panic!("`{driver}` listens nowhere: {said:?}")) {
            Ok(driver) => Some(Self::on(driver)),
            Err(error) if std::env::var("COHORT_REQUIRE_BROWSER").as_deref() == Ok("1") => {
                panic!("COHORT_REQUIRE_BROWSER=1, and `{driver}` does not start: {error}")
            }
            Err(error) => {
                eprintln!("skipped: `{driver}` does not start ({error}); see COHORT_CHROMEDRIVER");
                None
            }
        }
    }

    fn on(driver: Driver) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .timeout_global(Some(ANSWER));
        let profile = tempfile::tempdir().expect("a temporary directory");
        let mut browser = Self {
            driver: driver.process,
            session: format!("http://127.0.0.1:{}", driver.port),
            agent: config.build().into(),
            _profile: profile,
        };
        let data = format!("--user-data-dir={}", browser._profile.path().display());
        let arguments = json!([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--hide-scrollbars",
            "--window-size=1280,900",
            data,
        ]);
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }}});
        let begun = browser.post("/session", &wanted);
        let id = begun["sessionId"].as_str().expect("a session has an id");
        browser.session = format!("{}/session/{id}", browser.session);
        let timeout = json!({"script": DEADLINE.as_millis() as u64});
        browser.post("/timeouts", &timeout);
        browser
    }

    /// Goes to an address and waits until it is loaded.
    pub fn open(&self, url: &str) {
        self.post("/url", &json!({"url": url}));
    }

    /// Runs a script; gives what it returns.
    pub fn run(&self, script: &str) -> Value {
        self.post("/execute/sync", &json!({"script": script, "args": []}))
    }

    /// Waits until an expression is true or anything like it; gives its value.
    pub fn wait_for(&self, expression: &str) -> Value {
        let script = format!(
            "const done = arguments[arguments.length - 1];
             const look = () => {{
               let value = null;
               try {{ value = {expression}; }} catch {{ /* not there yet */ }}
               if (value) done(value); else requestAnimationFrame(look);
             }};
             look();"
        );
        let answer = self.send(
            "POST",
            "/execute/async",
            &json!({"script": script, "args": []}),
        );
        match answer {
            Ok(value) => value,
            Err(error) => panic!(
                "the page never had `{expression}`: {error}\nit shows: {}\nthe console: {:?}",
                self.run("return document.body.innerText.slice(0, 3000)"),
                self.console(),
            ),
        }
    }

    /// Clicks an element, as a reader would: it must be visible, and nothing may cover it.
    pub fn click(&self, selector: &str) {
        let found = self.post(
            "/element",
            &json!({"using": "css selector", "value": selector}),
        );
        let id = found.as_object().and_then(|ids| ids.values().next());
        let id = id
            .and_then(Value::as_str)
            .expect("an element has a reference");
        self.post(&format!("/element/{id}/click"), &json!({}));
    }

    /// Presses keys, one after the other, on whatever has the focus.
    pub fn press(&self, keys: &[&str]) {
        let actions: Vec<Value> = keys
            .iter()
            .flat_map(|key| ["keyDown", "keyUp"].map(|kind| json!({"type": kind, "value": key})))
            .collect();
        let source = json!({"type": "key", "id": "keyboard", "actions": actions});
        self.post("/actions", &json!({"actions": [source]}));
    }

    /// Types a text.
    pub fn type_text(&self, text: &str) {
        let keys: Vec<String> = text.chars().map(String::from).collect();
        self.press(&keys.iter().map(String::as_str).collect::<Vec<_>>());
    }

    /// Makes the window's inside so large, in CSS pixels; `phone` behaves like one.
    pub fn size(&self, width: u32, height: u32, phone: bool) {
        let to = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone});
        let command = json!({"cmd": "Emulation.setDeviceMetricsOverride", "params": to});
        self.post("/goog/cdp/execute", &command);
    }

    /// What is to be seen, as PNG.
    pub fn screenshot(&self) -> Vec<u8> {
        let picture = self.send("GET", "/screenshot", &json!({}));
        base64(
            picture
                .expect("a picture")
                .as_str()
                .expect("it is base64 text"),
        )
    }

    /// What the console says since the last call, without what only informs.
    pub fn console(&self) -> Vec<String> {
        let entries = self.post("/se/log", &json!({"type": "browser"}));
        let entries = entries.as_array().into_iter().flatten();
        let loud =
            entries.filter(|entry| entry["level"] == "SEVERE" || entry["level"] == "WARNING");
        loud.map(|entry| entry["message"].to_string()).collect()
    }

    /// The addresses of all requests of pages since the last call, without those of the browser's own pages.
    pub fn requests(&self) -> Vec<String> {
        let entries = self.post("/se/log", &json!({"type": "performance"}));
        let entries = entries.as_array().into_iter().flatten();
        let messages = entries.filter_map(|entry| {
            let event: Value = serde_json::from_str(entry["message"].as_str()?).ok()?;
            let event = &event["message"];
            let (asked, by) = match event["method"].as_str()? {
                "Network.requestWillBeSent" => {
                    let request = &event["params"];
                    (&request["request"]["url"], &request["documentURL"])
                }
                "Network.webSocketCreated" => (&event["params"]["url"], &Value::Null),
                _ => return None,
            };
            let own = by.as_str().is_some_and(|page| page.starts_with("chrome"));
            asked.as_str().filter(|_| !own).map(str::to_owned)
        });
        messages.collect()
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let answer = self.send("POST", path, body);
        answer.unwrap_or_else(|error| panic!("{path} {body}: {error}"))
    }

    /// One command; an error is what the driver said.
    fn send(&self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        let url = format!("{}{path}", self.session);
        let sent = match method {
            "GET" => self.agent.get(&url).call(),
            "DELETE" => self.agent.delete(&url).call(),
            _ => self
                .agent
                .post(&url)
                .content_type("application/json")
                .send(&body.to_string()),
        };
        let mut answer = sent.map_err(|error| error.to_string())?;
        let text = answer.body_mut().with_config().limit(MOST_BYTES);
        let text = text.read_to_string().map_err(|error| error.to_string())?;
        let said: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        match answer.status().is_success() {
            true => Ok(said["value"].clone()),
            false => Err(said["value"]["message"].to_string()),
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Ends the browser's own processes; the driver alone would leave them.
        let _ = self.send("DELETE", "", &json!({}));
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

/// Bytes from base64 (RFC 4648, section 4); what is no letter of it ends them.
fn base64(text: &str) -> Vec<u8> {
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut held) = (Vec::new(), 0u32, 0);
    for letter in text.bytes() {
        let Some(value) = letters.iter().position(|&known| known == letter) else {
            break;
        };
        bits = bits << 6 | value as u32;
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    bytes
}
