//! Files that others wrote (`common/golden/formats/make.py`): the same rows come out of all of them, and what is damaged is
//! refused in words.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::super::limits::Limits;
use super::super::{
    CorpusError, Event, PrepareRequest, ReadOptions, SourceFile, Split, TokenizerConfig, expand,
    prepare, read_content,
};
use super::tests::all;
use super::{Wanted, arrow, parquet};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/formats")
}

/// The files whose names begin so, with their content.
fn files(beginning: &str) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder()).expect("the files");
    let mut found = BTreeMap::new();
    for entry in entries {
        let path = entry.expect("a file").path();
        let name = path
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        if name.starts_with(beginning) {
            found.insert(name, std::fs::read(path).expect("its content"));
        }
    }
    found
}

fn texts(name: &str, content: &[u8]) -> Result<Vec<String>, CorpusError> {
    let options = ReadOptions {
        text_field: "text".into(),
        max_file_bytes: None,
        supervised: None,
    };
    let mut texts = Vec::new();
    read_content(
        &SourceFile::new(name, name),
        content,
        &options,
        &mut |event| {
            match event {
                Event::Text(text) => texts.push(text.to_owned()),
                Event::Bad(bad) => return Err(CorpusError::BadInput(bad)),
                Event::Start(_) | Event::End => {}
            }
            Ok(())
        },
    )?;
    Ok(texts)
}

fn lines(name: &str) -> Vec<Value> {
    let content = std::fs::read_to_string(folder().join(name)).expect("the file");
    let lines = content.lines();
    lines
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

#[test]
fn the_same_texts_are_in_all_formats() {
    let expected: Vec<String> = lines("docs.jsonl")
        .iter()
        .map(|line| line["text"].as_str().expect("a text").to_owned())
        .collect();
    let files = files("docs");
    assert!(files.len() > 28, "{}", files.len());
    for (name, content) in files {
        let found = texts(&name, &content).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn the_same_tokens_come_of_all_formats() {
    let tokens = |name: &str| {
        let home = tempfile::tempdir().expect("temporary directory");
        let sources = expand(&[folder().join(name)], false).expect("the file");
        let request = PrepareRequest::new(name, sources, TokenizerConfig::Char);
        let corpus = prepare(home.path(), &request, &|_| ())
            .unwrap_or_else(|error| panic!("{error}"))
            .corpus;
        Split::ALL.map(|split| {
            let reader = corpus.reader(split);
            let mut tokens = Vec::new();
            reader.copy(0..reader.tokens(), &mut tokens).expect("copy");
            tokens
        })
    };
    let expected = tokens("docs.jsonl");
    for name in files("docs").keys() {
        assert_eq!(tokens(name), expected, "{name}");
    }
}

#[test]
fn rows_of_lists_and_structs_become_the_same_objects() {
    let expected = lines("nested.jsonl");
    for (name, content) in files("nested") {
        let limits = Limits::of(content.len() as u64, None);
        let (rows, end) = match name.rsplit('.').next() {
            Some("parquet") => {
                let bytes = content.len() as u64;
                let input = Cursor::new(content);
                all(parquet::open(input, bytes, Wanted::Record, &limits).expect("a file"))
            }
            Some("arrow") => {
                let mut input = Cursor::new(&content);
                let contents = arrow::contents(&mut input, content.len() as u64).expect("a file");
                all(arrow::open(input, contents, Wanted::Record, &limits).expect("a file"))
            }
            _ => continue,
        };
        assert_eq!(end, None, "{name}");
        let mut found: Vec<Value> = rows
            .iter()
            .map(|row| serde_json::from_str(row).unwrap_or_else(|e| panic!("{name}: {e}: {row}")))
            .collect();
        // A column without any value has a type in Arrow, and none in Parquet.
        for row in &mut found {
            let row = row.as_object_mut().expect("an object");
            row.entry("nothing").or_insert(Value::Null);
        }
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn the_wrong_column_is_named_with_the_others() {
    let said = |name: &str, column: &str| {
        let options = ReadOptions {
            text_field: column.into(),
            max_file_bytes: None,
            supervised: None,
        };
        let content = std::fs::read(folder().join(name)).expect("the file");
        let file = SourceFile::new(name, name);
        let read = read_content(&file, &content, &options, &mut |_| Ok(()));
        read.expect_err("no such column").to_string()
    };
    let advice = "; repair it, or leave such input out with `--skip-bad`";
    for name in ["docs-v2.parquet", "docs-file.arrow", "docs.csv"] {
        assert_eq!(
            said(name, "body"),
            format!("`{name}` has no column `body`; its columns are `id`, `text`, `score`{advice}")
        );
    }
    for name in ["docs-v2.parquet", "docs-file.arrow"] {
        assert_eq!(
            said(name, "score"),
            format!("`{name}` has a column `score` that does not hold text{advice}")
        );
    }
}

/// Everything that can be done to one byte, at places spread over the file, and every way of cutting it off.
#[test]
fn damage_ends_in_words() {
    for (name, content) in files("") {
        if name == "make.py" {
            continue;
        }
        let step = (content.len() / 400).max(1);
        for at in (0..content.len()).step_by(step) {
            // What is read may be an error or not, but reading ends, and does not panic.
            let _ = texts(&name, &content[..at]);
            for change in [0x01, 0x80, 0xff] {
                let mut content = content.clone();
                content[at] ^= change;
                let _ = texts(&name, &content);
                records(&name, content);
            }
        }
    }
}

fn records(name: &str, content: Vec<u8>) {
    let bytes = content.len() as u64;
    let limits = Limits::of(bytes, Some(1 << 20));
    match name.rsplit('.').next() {
        Some("parquet") => {
            if let Ok(rows) = parquet::open(Cursor::new(content), bytes, Wanted::Record, &limits) {
                let _ = all(rows);
            }
        }
        Some("arrow") => {
            let mut input = Cursor::new(&content);
            let contents = arrow::contents(&mut input, bytes);
            if let Ok(rows) =
                contents.and_then(|contents| arrow::open(input, contents, Wanted::Record, &limits))
            {
                let _ = all(rows);
            }
        }
        _ => {}
    }
}
