//! Where text goes: results to stdout, and with `--json` only JSON lines there, while text for people goes to stderr.

use std::io::{IsTerminal, Write};

use anyhow::Result;

/// Where text goes in this command.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// Whether stdout is for JSON lines.
    pub json: bool,
}

impl Output {
    /// Prints a line for people.
    pub fn say(self, text: impl AsRef<str>) {
        let text = text.as_ref().trim_end_matches('\n');
        match self.json {
            true => eprintln!("{text}"),
            // A reader that has gone away, such as `head`, is no error.
            false => drop(writeln!(std::io::stdout(), "{text}")),
        }
    }

    /// Prints a JSON line, if asked for.
    pub fn line(self, value: &impl serde::Serialize) -> Result<()> {
        if self.json {
            let mut stdout = std::io::stdout().lock();
            writeln!(stdout, "{}", serde_json::to_string(value)?)?;
            stdout.flush()?;
        }
        Ok(())
    }
}

/// Asks a question that `y` answers with yes. Without a terminal the answer is no.
pub fn confirmed(question: &str) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Ok(false);
    }
    eprint!("{question} [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}

/// Rows with aligned columns; the first row is the heading. Columns of numbers are aligned to the right.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |row: &Vec<String>, column: usize| row.get(column).cloned().unwrap_or_default();
    let mut lines = vec![String::new(); rows.len()];
    for column in 0..columns {
        let cells: Vec<String> = rows.iter().map(|row| cell(row, column)).collect();
        let width = cells.iter().map(|c| c.chars().count()).max().unwrap_or(0);
        let numeric = cells.iter().skip(1).all(|cell| is_number(cell));
        for (line, cell) in lines.iter_mut().zip(&cells) {
            let space = " ".repeat(width - cell.chars().count());
            match numeric {
                true => *line += &format!("{space}{cell}  "),
                false => *line += &format!("{cell}{space}  "),
            }
        }
    }
    let lines: Vec<&str> = lines.iter().map(|line| line.trim_end()).collect();
    lines.join("\n")
}

/// A text of any kind as one line of at most `width` columns: line breaks are shown as `↵`, what else controls a terminal
/// as `·`.
pub fn one_line(text: &str, width: usize) -> String {
    let shown = |c: char| match c {
        '\n' => '↵',
        '\t' => ' ',
        c if c.is_control() => '·',
        c => c,
    };
    let line: String = text.replace("\r\n", "\n").chars().map(shown).collect();
    console::truncate_str(&line, width, "…").into_owned()
}

/// A text that may be empty, for people.
pub fn or_nothing(text: &str) -> &str {
    match text.is_empty() {
        true => "(nothing)",
        false => text,
    }
}

/// Whether a cell is a number, perhaps with a unit, or nothing.
fn is_number(cell: &str) -> bool {
    let word = cell.split(' ').next().unwrap_or_default();
    let number = word.trim_end_matches(['k', 'M', 'B', 'T']).replace('/', "");
    word.is_empty() || word == "-" || number.parse::<f64>().is_ok()
}

/// How long ago a moment was, in milliseconds since the epoch.
pub fn ago(then_ms: u64) -> String {
    let passed = now_ms().saturating_sub(then_ms);
    format!("{} ago", duration(passed as f64 / 1000.0))
}

/// Milliseconds since the epoch.
pub fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// A duration for people.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "?".into();
    }
    let whole = seconds.round().max(0.0) as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        3600..86_400 => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} d {} h", whole / 86_400, whole % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_aligned_to_the_right_and_words_to_the_left() {
        let row = |a: &str, b: &str| vec![a.to_owned(), b.to_owned()];
        let text = table(&[row("run", "step"), row("a", "5"), row("longer", "100")]);
        assert_eq!(text, "run     step\na          5\nlonger   100");
    }

    #[test]
    fn a_text_of_any_kind_fits_into_a_line() {
        assert_eq!(one_line("a\nb\r\nc\td", 80), "a↵b↵c d");
        assert_eq!(one_line("\u{1b}[31mred\u{7}", 80), "·[31mred·");
        assert_eq!(one_line("0123456789", 10), "0123456789");
        assert_eq!(one_line("0123456789a", 10), "012345678…");
        // Some characters take two columns.
        assert_eq!(one_line("漢字漢字漢字", 7), "漢字漢…");
    }

    #[test]
    fn durations_for_people() {
        assert_eq!(duration(7.4), "7 s");
        assert_eq!(duration(61.0), "1 min 01 s");
        assert_eq!(duration(7_261.0), "2 h 01 min");
        assert_eq!(duration(f64::NAN), "?");
    }
}
