//! One text of a JSON object: everything else is passed over, so that memory is the text's, whatever stands beside it.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::error::Problem;
use super::formats::{LISTED, first_of};

/// The text in `field` of the object that `line` is. Of several of that name the last one counts.
///
/// # Errors
/// No object, no such field, or no text in it.
pub(super) fn field_of(line: &str, field: &str) -> Result<String, Problem> {
    let mut json = serde_json::Deserializer::from_str(line);
    let found = Object { field }
        .deserialize(&mut json)
        .and_then(|found| json.end().map(|()| found))
        .map_err(|error| Problem::BadJson(error.to_string()))?;
    match found.value {
        Some(Some(text)) => Ok(text),
        Some(None) => Err(Problem::NotAString(field.to_owned())),
        None => Err(Problem::NoField {
            field: field.to_owned(),
            present: first_of(found.others.iter().map(String::as_str), found.fields),
        }),
    }
}

/// What an object has.
#[derive(Default)]
struct Found {
    /// The field, if it is there, and its text, if it is one.
    value: Option<Option<String>>,
    /// All other fields, and the names of the first of them.
    fields: usize,
    others: Vec<String>,
}

/// An object of which one field is wanted.
struct Object<'a> {
    field: &'a str,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = Found;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Found, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
        let mut found = Found::default();
        loop {
            let key = Key {
                field: self.field,
                found: &mut found,
            };
            match map.next_key_seed(key)? {
                Some(true) => found.value = Some(map.next_value_seed(Text)?),
                Some(false) => {
                    map.next_value::<IgnoredAny>()?;
                }
                None => return Ok(found),
            }
        }
    }
}

/// The name of a field: whether it is the wanted one. Others are counted.
struct Key<'a, 'b> {
    field: &'a str,
    found: &'b mut Found,
}

impl<'de> DeserializeSeed<'de> for Key<'_, '_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<bool, D::Error> {
        json.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_, '_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string key")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<bool, E> {
        if name == self.field {
            return Ok(true);
        }
        self.found.fields += 1;
        if self.found.others.len() < LISTED {
            self.found.others.push(name.to_owned());
        }
        Ok(false)
    }
}

/// A text; `None` is any other value.
struct Text;

impl<'de> DeserializeSeed<'de> for Text {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Text {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Some(text.to_owned()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Self::Value, E> {
        Ok(Some(text))
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Self::Value, A::Error> {
        while fields.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_STRING: &str = "has a field `text` that is not a string";

    fn said(line: &str) -> String {
        match field_of(line, "text") {
            Ok(text) => text,
            Err(problem) => problem.to_string(),
        }
    }

    #[test]
    fn the_last_text_of_that_name_counts_whatever_stands_beside_it() {
        let line =
            r#" {"a": [1, {"text": "b"}], "text": "c", "\u0074ext": "d\né", "e": {"f": 1e9}} "#;
        assert_eq!(said(line), "d\né");
        assert_eq!(said(r#"{"text": "a", "text": null}"#), NO_STRING);
    }

    #[test]
    fn what_is_no_text_is_said() {
        for value in [
            "null",
            "true",
            "-1",
            "1",
            "1.5",
            "[\"a\"]",
            "{\"text\": \"a\"}",
        ] {
            assert_eq!(said(&format!("{{\"text\": {value}, \"b\": 1}}")), NO_STRING);
        }
        assert_eq!(said("{}"), "has no text field `text`; its fields are none");
        let fields: Vec<String> = (0..10).map(|i| format!("\"f{i}\": {i}")).collect();
        assert_eq!(
            said(&format!("{{{}}}", fields.join(", "))),
            "has no text field `text`; its fields are `f0`, `f1`, `f2`, `f3`, `f4`, `f5`, `f6`, `f7`, and 2 more"
        );
        for line in [
            "[1]",
            "{\"text\": \"a\"",
            "{\"text\": \"a\"} b",
            "{\"text\" \"a\"}",
            "7",
        ] {
            assert!(said(line).starts_with("is not a JSON object: "), "{line}");
        }
        let sequence = "is not a JSON object: invalid type: sequence, expected a map";
        assert!(said("[1]").starts_with(sequence), "{}", said("[1]"));
    }
}
