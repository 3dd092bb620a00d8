//! The files under `deploy/` and the commands in the documentation: their syntax, and that each verb and flag in them
//! exists in the real binary. No container, cluster or service is started.

mod kubernetes;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// A path in the repository.
fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The files with that extension in a folder, sorted.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(repository(folder)).expect("the folder can be listed");
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    found.sort();
    assert!(!found.is_empty(), "no .{extension} in {folder}");
    found
}

/// The documents of a YAML file. Duplicate keys are errors.
fn yaml(path: &Path) -> Vec<Value> {
    serde_saphyr::from_multiple(&read(path))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A list of strings.
fn strings(value: &Value) -> Vec<String> {
    let items = value.as_array().map_or(&[][..], Vec::as_slice);
    let text = |v: &Value| v.as_str().map(String::from);
    items
        .iter()
        .map(|v| text(v).unwrap_or_else(|| panic!("{v} must be a string; quote it")))
        .collect()
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    let found = value.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or_else(|| panic!("no text at {pointer} in {value:#}"))
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    let found = value.pointer(pointer).and_then(Value::as_array);
    found.map_or(&[], Vec::as_slice)
}

/// The flags that the binary's help for a verb names; `None` if there is no such verb.
fn flags_of(verb: &str) -> Option<BTreeSet<String>> {
    let output = Command::new(env!("CARGO_BIN_EXE_cohort"))
        .args(verb.split(' '))
        .arg("--help")
        .env_remove("COHORT_HOME")
        .env_remove("COHORT_TOKEN")
        .output()
        .expect("the binary starts");
    let help = String::from_utf8(output.stdout).expect("help is UTF-8");
    // `  -y, --yes  Do not ask`: what stands before the description. Examples name flags of other verbs.
    let options = help.lines().map(str::trim).filter(|l| l.starts_with('-'));
    let flags = options
        .filter_map(|line| line.split("  ").next())
        .flat_map(|names| names.split([' ', ',', '=']))
        .filter(|word| word.starts_with("--"))
        .map(String::from);
    output.status.success().then(|| flags.collect())
}

/// Checks the arguments of one `cohort` command: verb and flags exist, and a listener beyond loopback is encrypted.
fn check_arguments(place: &str, arguments: &[String]) {
    let verb = match arguments {
        // Verbs with verbs of their own.
        [verb, inner, ..] if matches!(&**verb, "corpus" | "token") && !inner.starts_with('-') => {
            format!("{verb} {inner}")
        }
        [verb, ..] if verb.starts_with('-') => return,
        [verb, ..] => verb.clone(),
        [] => panic!("{place}: no verb"),
    };
    let known =
        flags_of(&verb).unwrap_or_else(|| panic!("{place}: `cohort {verb}` does not exist"));
    for flag in arguments.iter().filter(|a| a.starts_with("--")) {
        let name = flag.split('=').next().expect("a first part");
        assert!(
            known.contains(name),
            "{place}: `cohort {verb}` has no flag `{name}`"
        );
    }
    let listens = arguments.iter().skip_while(|a| *a != "--listen").nth(1);
    if listens.is_some_and(|at| !at.starts_with("127.") && !at.starts_with("localhost")) {
        let open = arguments.iter().any(|a| a == "--insecure");
        assert!(!open, "{place}: listens beyond loopback without TLS");
    }
}

/// Splits a line into words as a shell does: white space separates, quotes join, a comment ends it.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in line.chars() {
        match (c, quote) {
            (c, Some(q)) if c == q => quote = None,
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            ('#', None) if word.is_none() => break,
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    assert!(quote.is_none(), "an open quote in `{line}`");
    words.extend(word);
    words
}

#[test]
fn words_are_split_as_by_a_shell() {
    assert_eq!(
        words("a --prompt 'Once upon' \"\" b # c"),
        ["a", "--prompt", "Once upon", "", "b"]
    );
}

#[test]
fn compose_file_is_sound() {
    let path = repository("deploy/compose.yaml");
    let documents = yaml(&path);
    let [compose] = &documents[..] else {
        panic!("one document in {}", path.display());
    };
    let services = compose["services"].as_object().expect("services");
    assert!(services.contains_key("coordinator") && services.contains_key("worker"));
    for (name, service) in services {
        let place = format!("compose.yaml, service {name}");
        let command = strings(&service["command"]);
        check_arguments(&place, &command);
        if name != "init" {
            let waits = text(service, "/stop_grace_period").trim_end_matches('s');
            check_grace(&place, &command, waits.parse().expect("seconds"));
        }
        for secret in strings(&service["secrets"]) {
            assert!(!compose["secrets"][&secret].is_null(), "{place}: {secret}");
        }
        for needed in service["depends_on"].as_object().into_iter().flatten() {
            assert!(services.contains_key(needed.0), "{place}: {}", needed.0);
        }
        for volume in strings(&service["volumes"]) {
            let source = volume.split(':').next().expect("a first part");
            let declared = compose["volumes"].get(source).is_some();
            assert!(
                declared || source.starts_with(['.', '/']),
                "{place}: {volume}"
            );
        }
    }
    let probe = strings(&compose["services"]["coordinator"]["healthcheck"]["test"]);
    assert_eq!(probe[..2], ["CMD", "/usr/local/bin/cohort"]);
    check_arguments("compose.yaml, healthcheck", &probe[2..]);
    let replicas = compose.pointer("/services/worker/deploy/replicas");
    assert!(replicas.and_then(Value::as_u64) >= Some(2));
}

/// Seconds that a process has for its hand-over, as a `cohort` command says or leaves to the default.
fn grace_of(arguments: &[String]) -> u64 {
    let given = arguments.iter().skip_while(|a| *a != "--grace").nth(1);
    given.map_or(20, |seconds| seconds.parse().expect("whole seconds"))
}

/// Checks that whoever ends a process waits longer than its hand-over takes.
fn check_grace(place: &str, arguments: &[String], waits: u64) {
    let grace = grace_of(arguments);
    // Copies to a store, which whoever uses these files may name, come after a coordinator's.
    let copies = match arguments.iter().any(|word| word == "coordinator") {
        true => 20,
        false => 0,
    };
    assert!(
        waits > grace + copies,
        "{place}: killed after {waits} s, and --grace is {grace} s, with {copies} s for copies after it"
    );
}

#[test]
fn the_slurm_job_is_sound() {
    let script = read(&repository("deploy/slurm/cohort.sbatch"));
    let whole = script.replace("\\\n", " ");
    let mut verbs = Vec::new();
    for line in whole.lines().map(str::trim) {
        let line = line.strip_prefix("exec ").unwrap_or(line);
        let Some(command) = line.strip_prefix("cohort ") else {
            continue;
        };
        let arguments: Vec<String> = command.split_whitespace().map(String::from).collect();
        // Which verb is to be run is said by whoever submits the job.
        if arguments[0] != "\"$verb\"" {
            check_arguments("cohort.sbatch", &arguments);
        }
        verbs.push(arguments[0].clone());
    }
    assert_eq!(
        verbs,
        ["init", "coordinator", "runs", "worker", "\"$verb\""]
    );
    // `#SBATCH --signal=B:TERM@120`, and `${COHORT_GRACE:-60}`.
    let number_after = |what: &str| {
        let (_, rest) = script.split_once(what).expect(what);
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
        digits
            .and_then(|digits| digits.parse::<u64>().ok())
            .expect(what)
    };
    assert!(number_after("--signal=B:TERM@") > number_after("COHORT_GRACE:-") + 20);
    assert!(script.contains("#SBATCH --requeue"));
}

/// The sections of a systemd unit: name, then keys and values in order.
fn ini(path: &Path) -> BTreeMap<String, Vec<(String, String)>> {
    let mut sections = BTreeMap::new();
    let mut current: Option<String> = None;
    for (number, line) in (1..).zip(read(path).lines()) {
        let line = line.trim();
        let place = || format!("{}, line {number}: `{line}`", path.display());
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            let fresh = sections.insert(name.to_string(), Vec::new()).is_none();
            assert!(fresh, "{}: a second section", place());
            current = Some(name.to_string());
            continue;
        }
        let (key, value) = line
            .split_once('=')
            .unwrap_or_else(|| panic!("{}", place()));
        assert!(
            key.bytes().all(|b| b.is_ascii_alphanumeric()),
            "{}",
            place()
        );
        let section = current.as_ref().unwrap_or_else(|| panic!("{}", place()));
        let entries = sections.get_mut(section).expect("it was opened");
        entries.push((key.to_string(), value.to_string()));
    }
    sections
}

#[test]
fn systemd_units_are_sound() {
    for path in files("deploy/systemd", "service") {
        let place = path.display().to_string();
        let unit = ini(&path);
        let names: Vec<&str> = unit.keys().map(String::as_str).collect();
        assert_eq!(names, ["Install", "Service", "Unit"], "{place}");
        let service = &unit["Service"];
        let value = |key: &str| {
            let found = service.iter().find(|(k, _)| k == key);
            &found.unwrap_or_else(|| panic!("{place}: no {key}")).1
        };
        assert_eq!(value("DynamicUser"), "yes", "{place}");
        let stop = value("TimeoutStopSec").parse().expect("seconds");
        check_grace(&place, &words(value("ExecStart")), stop);
        let commands = service
            .iter()
            .filter(|(key, _)| key.starts_with("ExecStart"));
        for (_, line) in commands {
            let command = words(line);
            assert_eq!(command[0], "/usr/local/bin/cohort", "{place}");
            check_arguments(&place, &command[1..]);
            let token = command.iter().any(|word| word.ends_with("/token"));
            assert!(
                !token || value("LoadCredential").starts_with("token:"),
                "{place}"
            );
        }
    }
}

/// The instructions of a Dockerfile with their arguments; continued lines are joined.
fn dockerfile(path: &Path) -> Vec<(String, String)> {
    let text = read(path).replace("\\\n", " ");
    let lines = text.lines().map(str::trim);
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| {
            let (name, rest) = line
                .split_once(char::is_whitespace)
                .unwrap_or_else(|| panic!("`{line}` has no argument"));
            (name.to_string(), rest.trim().to_string())
        })
        .collect()
}

#[test]
fn dockerfiles_are_sound() {
    for name in ["deploy/Dockerfile", "deploy/Dockerfile.cuda"] {
        check_dockerfile(&dockerfile(&repository(name)));
    }
}

fn check_dockerfile(instructions: &[(String, String)]) {
    let known = [
        "ARG",
        "CMD",
        "COPY",
        "ENTRYPOINT",
        "ENV",
        "EXPOSE",
        "FROM",
        "LABEL",
        "RUN",
        "SHELL",
        "USER",
        "WORKDIR",
    ];
    let mut stages = BTreeSet::new();
    for (name, rest) in instructions {
        assert!(known.contains(&name.as_str()), "unknown instruction {name}");
        match name.as_str() {
            "FROM" => stages.extend(rest.split_once(" AS ").map(|(_, stage)| stage)),
            "COPY" => {
                let from = rest.split(' ').find_map(|w| w.strip_prefix("--from="));
                assert!(from.is_none_or(|f| stages.contains(f)), "COPY {rest}");
            }
            _ => {}
        }
    }
    let last = |wanted: &str| {
        let found = instructions.iter().rev().find(|(name, _)| name == wanted);
        found.map(|(_, rest)| rest.as_str())
    };
    let user = last("USER").expect("a user");
    assert!(
        !user.starts_with("root") && !user.starts_with('0'),
        "runs as root"
    );
    let entry: Vec<String> =
        serde_json::from_str(last("ENTRYPOINT").expect("an entry point")).expect("the exec form");
    let built = instructions
        .iter()
        .any(|(name, rest)| name == "RUN" && rest.split(' ').any(|word| word.ends_with(&entry[0])));
    assert!(built && last("COPY").is_some(), "{entry:?} is made");
    let default: Vec<String> =
        serde_json::from_str(last("CMD").expect("a default command")).expect("the exec form");
    check_arguments("Dockerfile, CMD", &default);
}

/// The `cohort` commands in the fenced shell blocks of a page: line number and arguments.
fn commands_in(page: &str) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    let mut in_shell = false;
    let mut continued = String::new();
    for (number, line) in (1..).zip(page.lines()) {
        if let Some(language) = line.trim().strip_prefix("```") {
            in_shell = language == "sh";
            continue;
        }
        if !in_shell {
            continue;
        }
        if let Some(start) = line.trim_end().strip_suffix('\\') {
            continued.push_str(start);
            continue;
        }
        let line = std::mem::take(&mut continued) + line;
        let mut words = words(&line);
        if let Some(end) = words
            .iter()
            .position(|w| ["|", ">", "&", "&&", "<"].contains(&w.as_str()))
        {
            words.truncate(end);
        }
        let program = words.iter().position(|w| w == "cohort");
        let through_cargo = words.starts_with(&["cargo".into(), "run".into()]);
        let start = match through_cargo {
            true => words.iter().position(|w| w == "--").map(|at| at + 1),
            false => program.filter(|at| *at == 0).map(|at| at + 1),
        };
        found.extend(start.map(|at| (number, words.split_off(at))));
    }
    found
}

#[test]
fn documented_commands_exist() {
    let mut pages = files("docs", "md");
    pages.extend(files("deploy", "md"));
    pages.push(repository("README.md"));
    pages.push(repository("ARCHITECTURE.md"));
    let mut checked = 0;
    for page in pages {
        for (line, arguments) in commands_in(&read(&page)) {
            check_arguments(&format!("{}, line {line}", page.display()), &arguments);
            checked += 1;
        }
    }
    assert!(checked >= 10, "only {checked} commands were found");
}

#[test]
fn commands_are_found_in_shell_blocks_only() {
    let page = "cohort a\n```sh\ncohort b \\\n  --x 1 # c\ncargo run --release -- d | cat\nls cohort\n```\n```text\ncohort e\n```\n";
    let found: Vec<_> = commands_in(page)
        .into_iter()
        .map(|(_, c)| c.join(" "))
        .collect();
    assert_eq!(found, ["b --x 1", "d"]);
}

#[test]
fn prometheus_scrapes_with_a_token() {
    for path in files("deploy/prometheus", "yml") {
        let [config] = &yaml(&path)[..] else {
            panic!("{}: one document", path.display());
        };
        for job in list(config, "/scrape_configs") {
            assert_eq!(text(job, "/metrics_path"), "/metrics");
            assert_eq!(text(job, "/authorization/type"), "Bearer");
            let target = text(job, "/static_configs/0/targets/0");
            assert!(target.ends_with(":7070"), "{target}");
        }
    }
}
