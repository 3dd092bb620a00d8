//! What a user reads when something is wrong, word for word: exit code, stdout and stderr of commands that fail before
//! anything is trained. Paths of the temporary directory become `[DIR]`, ports that the system has chosen `[PORT]`.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use insta::assert_snapshot;
use tempfile::TempDir;

/// A temporary directory to run the binary in, with `home` as its home directory.
struct Scene {
    dir: TempDir,
}

impl Scene {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().expect("a temporary directory"),
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> &Self {
        std::fs::write(self.path().join(name), content).expect("a file is written");
        self
    }

    /// Runs `cohort` and gives what it printed. The words of the command line are separated by spaces.
    fn run(&self, line: &str) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_cohort"))
            .args(line.split(' '))
            .current_dir(self.path())
            .env_remove("COHORT_COORDINATOR")
            .env_remove("COHORT_TOKEN")
            .env_remove("COHORT_LOG")
            .env("COHORT_HOME", self.path().join("home"))
            .stdin(Stdio::null())
            .output()
            .expect("the binary runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        let code = output
            .status
            .code()
            .map_or("none".into(), |code| code.to_string());
        let mut shown = format!("exit code {code}");
        if !stdout.is_empty() {
            shown += &format!("\n--- stdout\n{stdout}");
        }
        if !stderr.is_empty() {
            shown += &format!("\n--- stderr\n{stderr}");
        }
        shown.replace(&self.path().display().to_string(), "[DIR]")
    }

    /// The same, with that port shown as `[PORT]`.
    fn run_with_port(&self, line: &str, port: u16) -> String {
        self.run(line).replace(&port.to_string(), "[PORT]")
    }
}

/// A port that nobody listens on.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

#[test]
fn a_spec_with_an_unknown_key() {
    let scene = Scene::new();
    scene
        .write("spec.toml", "[train]\nstpes = 10\n")
        .write("text.txt", "text");
    assert_snapshot!(scene.run("pretrain spec.toml --corpus text.txt --local 1"), @"");
    assert_snapshot!(scene.run("pretrain --corpus text.txt --local 1 --set train.lanse=3"), @"");
}

#[test]
fn a_spec_with_an_impossible_value() {
    let scene = Scene::new();
    scene
        .write(
            "spec.toml",
            "[model]\nhidden_size = 100\nnum_attention_heads = 3\n",
        )
        .write("text.txt", "text");
    assert_snapshot!(scene.run("pretrain spec.toml --corpus text.txt --local 1"), @"");
    assert_snapshot!(scene.run("pretrain --preset tiny --corpus text.txt --set train.lanes=0 --local 1"), @"");
    assert_snapshot!(scene.run("pretrain --preset tiny --local 1"), @"");
}

#[test]
fn a_spec_that_is_not_there() {
    assert_snapshot!(Scene::new().run("pretrain spec.toml --local 1"), @"");
}

#[test]
fn an_unknown_preset() {
    assert_snapshot!(Scene::new().run("pretrain --preset tini --local 1"), @"");
    assert_snapshot!(Scene::new().run("presets huge"), @"");
}

#[test]
fn corpus_files_that_cannot_be_used() {
    let scene = Scene::new();
    scene
        .write("empty.txt", "")
        .write("binary.txt", b"some text\0more")
        .write("latin.txt", b"caf\xe9 au lait")
        .write(
            "broken.jsonl",
            "{\"text\": \"fine\"}\n{\"content\": \"other\"}\n",
        );
    std::fs::create_dir(scene.path().join("pictures")).expect("a directory");
    assert_snapshot!(scene.run("pretrain --preset tiny --corpus missing.txt --local 1"), @"");
    assert_snapshot!(scene.run("pretrain --preset tiny --corpus empty.txt --local 1"), @"");
    assert_snapshot!(scene.run("pretrain --preset tiny --corpus binary.txt --local 1"), @"");
    assert_snapshot!(scene.run("pretrain --preset tiny --corpus latin.txt --local 1"), @"");
    assert_snapshot!(scene.run("pretrain --preset tiny --corpus broken.jsonl --local 1"), @"");
    assert_snapshot!(scene.run("pretrain --preset tiny --corpus pictures --local 1"), @"");
    assert_snapshot!(scene.run("pretrain --preset tiny --corpus *.rs --local 1"), @"");
    assert!(!scene.path().join("home").exists(), "nothing was started");
}

#[test]
fn no_coordinator() {
    let (scene, port) = (Scene::new(), free_port());
    let line = format!("cancel tiny-1 --coordinator http://127.0.0.1:{port}");
    assert_snapshot!(scene.run_with_port(&line, port), @"");
    assert_snapshot!(scene.run("cancel tiny-1 --coordinator http://"), @"");
}

#[test]
fn a_port_in_use() {
    let scene = Scene::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let line = format!("coordinator --listen 127.0.0.1:{port}");
    assert_snapshot!(scene.run_with_port(&line, port), @"");
    assert_snapshot!(scene.run("coordinator --listen nonsense"), @"");
}

#[test]
fn listening_for_others_without_a_token() {
    let scene = Scene::new();
    assert_snapshot!(scene.run("coordinator --listen 0.0.0.0:0"), @"");
    scene.write("token", "short");
    assert_snapshot!(scene.run("coordinator --listen 0.0.0.0:0 --token-file token"), @"");
    assert_snapshot!(scene.run("coordinator --listen 0.0.0.0:0 --token-file absent"), @"");
}

#[test]
fn a_home_that_cannot_be_written() {
    let scene = Scene::new();
    // A file in the place of a directory cannot be written by anybody, not even by root.
    scene
        .write("home", "a file")
        .write("text.txt", "text ".repeat(1000));
    assert_snapshot!(scene.run("coordinator --listen 127.0.0.1:0"), @"");
    assert_snapshot!(scene.run("pretrain --preset tiny --corpus text.txt --local 1"), @"");
}

#[test]
fn an_unknown_run() {
    let scene = Scene::new();
    assert_snapshot!(scene.run("status tiny-1"), @"");
    assert_snapshot!(scene.run("generate --from tiny-1@best --prompt x"), @"");
    assert_snapshot!(scene.run("generate --from tiny-1@worst --prompt x"), @"");
    assert_snapshot!(scene.run("generate --from ./nowhere --prompt x"), @"");
}

#[test]
fn a_device_that_this_build_does_not_have() {
    assert_snapshot!(Scene::new().run("generate --from ./nowhere --prompt x --device tpu"), @"");
}

#[test]
fn usage_errors_have_the_exit_code_2() {
    let shown = Scene::new().run("pretrain --local 0");
    assert!(
        shown.starts_with("exit code 2\n--- stderr\nerror: "),
        "{shown}"
    );
    let shown = Scene::new().run("pretrain --local 2 --coordinator http://127.0.0.1:1");
    assert!(
        shown.starts_with("exit code 2\n--- stderr\nerror: "),
        "{shown}"
    );
}
