//! What a check has found, and how that looks.

use serde::Serialize;

/// How a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, and could be better.
    Note,
    /// Something will not work.
    Problem,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Problem => "problem",
        }
    }
}

/// What was found of one thing, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The thing.
    pub check: &'static str,
    /// How it is.
    pub level: Level,
    /// What was found.
    pub text: String,
    /// What to do; `None` where nothing is to be done.
    pub todo: Option<String>,
}

impl Finding {
    /// As it should be.
    pub fn ok(check: &'static str, text: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Ok,
            text: text.into(),
            todo: None,
        }
    }

    /// It could be better.
    pub fn note(check: &'static str, text: impl Into<String>, todo: impl Into<String>) -> Self {
        Self {
            level: Level::Note,
            todo: Some(todo.into()),
            ..Self::ok(check, text)
        }
    }

    /// It will not work.
    pub fn problem(check: &'static str, text: impl Into<String>, todo: impl Into<String>) -> Self {
        Self {
            level: Level::Problem,
            ..Self::note(check, text, todo)
        }
    }
}

/// Findings for people: a line each, with what to do below it.
pub fn render(findings: &[Finding]) -> String {
    let width = findings.iter().map(|f| f.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let (level, check) = (finding.level.word(), finding.check);
        text += &format!("{level:<8} {check:<width$}  {}\n", finding.text);
        if let Some(todo) = &finding.todo {
            text += &format!("{:8} {:width$}  -> {todo}\n", "", "");
        }
    }
    text + &summary(findings)
}

fn summary(findings: &[Finding]) -> String {
    let count = |level| findings.iter().filter(|f| f.level == level).count();
    let plural = |count, what: &str| match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    };
    match (count(Level::Problem), count(Level::Note)) {
        (0, 0) => "this machine is fit for Cohort\n".into(),
        (0, notes) => format!(
            "this machine is fit for Cohort; {}\n",
            plural(notes, "note")
        ),
        (problems, notes) => format!(
            "{}, {}\n",
            plural(problems, "problem"),
            plural(notes, "note")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_lines_and_end_with_a_count() {
        let fine = [Finding::ok("cores", "8")];
        insta::assert_snapshot!(render(&fine), @r"
        ok       cores  8
        this machine is fit for Cohort
        ");
        let mixed = [
            Finding::ok("cores", "8"),
            Finding::note("open files", "256", "raise the limit"),
            Finding::problem("home", "it cannot be written", "choose another"),
        ];
        insta::assert_snapshot!(render(&mixed), @r"
        ok       cores       8
        note     open files  256
                             -> raise the limit
        problem  home        it cannot be written
                             -> choose another
        1 problem, 1 note
        ");
        insta::assert_snapshot!(render(&mixed[..2]).lines().last().unwrap(), @"this machine is fit for Cohort; 1 note");
        let json = serde_json::to_string(&mixed[1]).unwrap();
        assert_eq!(
            json,
            r#"{"check":"open files","level":"note","text":"256","todo":"raise the limit"}"#
        );
    }
}
