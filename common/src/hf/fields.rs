//! The fields of a config, read one by one with an error that names them. Whatever is read is remembered, so that what
//! nobody asked for can be refused.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::{HfError, SpecialTokens};

/// A JSON object. An absent field and `null` are the same, as they nearly always are to `transformers`; where they are
/// not, [`Fields::has`] tells them apart.
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// What comes before the names of its fields in errors.
    prefix: String,
    asked: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Fields<'a> {
    pub fn of(map: &'a Map<String, Value>) -> Self {
        Self {
            map,
            prefix: String::new(),
            asked: RefCell::default(),
        }
    }

    /// The object in a field, if the field is there.
    pub fn object(&self, field: &'static str) -> Result<Option<Fields<'a>>, HfError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        let map = value.as_object();
        Ok(Some(Self {
            map: map.ok_or_else(|| self.invalid(field, "an object"))?,
            prefix: format!("{}{field}.", self.prefix),
            asked: RefCell::default(),
        }))
    }

    pub fn get(&self, field: &'static str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(field);
        self.map.get(field).filter(|v| !v.is_null())
    }

    /// Whether the field is there, be it `null`.
    pub fn has(&self, field: &'static str) -> bool {
        self.map.contains_key(field)
    }

    /// The name of a field in errors.
    pub fn name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    fn value(&self, field: &str) -> String {
        self.map.get(field).unwrap_or(&Value::Null).to_string()
    }

    pub fn missing(&self, field: &str) -> HfError {
        HfError::Missing(self.name(field))
    }

    pub fn invalid(&self, field: &str, expected: impl Into<String>) -> HfError {
        HfError::Invalid {
            field: self.name(field),
            value: self.value(field),
            expected: expected.into(),
        }
    }

    pub fn unsupported(&self, field: &str, expected: impl Into<String>) -> HfError {
        HfError::Unsupported {
            field: self.name(field),
            value: self.value(field),
            expected: expected.into(),
        }
    }

    /// An absent field is fine: it means the usual mathematics.
    pub fn only(
        &self,
        field: &'static str,
        expected: &str,
        ok: impl Fn(&Value) -> bool,
    ) -> Result<(), HfError> {
        match self.get(field) {
            Some(value) if !ok(value) => Err(self.unsupported(field, expected)),
            _ => Ok(()),
        }
    }

    pub fn only_false(&self, field: &'static str) -> Result<(), HfError> {
        self.only(field, "false", |v| v == &Value::Bool(false))
    }

    pub fn only_true(&self, field: &'static str) -> Result<(), HfError> {
        self.only(field, "true", |v| v == &Value::Bool(true))
    }

    pub fn only_number(&self, field: &'static str, number: f64) -> Result<(), HfError> {
        self.only(field, &number.to_string(), |v| v.as_f64() == Some(number))
    }

    /// Refuses the first field that has a value, was not read and is not harmless.
    pub fn refuse_unknown(&self, harmless: impl Fn(&str) -> bool) -> Result<(), HfError> {
        let asked = self.asked.borrow();
        let mut given = self.map.iter().filter(|(_, value)| !value.is_null());
        match given.find(|(name, _)| !asked.contains(name.as_str()) && !harmless(name)) {
            None => Ok(()),
            Some((name, _)) => Err(HfError::Unknown {
                field: self.name(name),
            }),
        }
    }

    pub fn size(&self, field: &'static str, max: usize) -> Result<usize, HfError> {
        let value = self.get(field).ok_or_else(|| self.missing(field))?.as_u64();
        match value.and_then(|v| usize::try_from(v).ok()) {
            Some(size) if (1..=max).contains(&size) => Ok(size),
            _ => Err(self.invalid(field, format!("a whole number from 1 to {max}"))),
        }
    }

    pub fn size_or(
        &self,
        field: &'static str,
        max: usize,
        default: usize,
    ) -> Result<usize, HfError> {
        self.get(field)
            .map_or(Ok(default), |_| self.size(field, max))
    }

    pub fn flag_or(&self, field: &'static str, default: bool) -> Result<bool, HfError> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.invalid(field, "true or false")),
        }
    }

    pub fn positive(&self, field: &'static str) -> Result<f32, HfError> {
        let value = self.get(field).ok_or_else(|| self.missing(field))?;
        match value.as_f64().map(|v| v as f32) {
            Some(v) if v.is_finite() && v > 0.0 => Ok(v),
            _ => Err(self.invalid(field, "a positive number")),
        }
    }

    pub fn positive_or(&self, field: &'static str, default: f32) -> Result<f32, HfError> {
        self.get(field)
            .map_or(Ok(default), |_| self.positive(field))
    }

    pub fn probability_or(&self, field: &'static str, default: f32) -> Result<f32, HfError> {
        let Some(value) = self.get(field) else {
            return Ok(default);
        };
        match value.as_f64().map(|v| v as f32) {
            Some(v) if (0.0..1.0).contains(&v) => Ok(v),
            _ => Err(self.invalid(field, "a probability from 0 to below 1")),
        }
    }

    /// The field, or the number that stands for it, must divide `whole`.
    pub fn divides(
        &self,
        field: &'static str,
        part: usize,
        whole: usize,
        name: &str,
    ) -> Result<(), HfError> {
        match whole.is_multiple_of(part) {
            true => Ok(()),
            false => Err(self.invalid(field, format!("a divisor of {name}, which is {whole}"))),
        }
    }

    fn token(&self, field: &'static str, value: &Value) -> Result<u32, HfError> {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| self.invalid(field, "a token id"))
    }

    pub fn special_tokens(&self) -> Result<SpecialTokens, HfError> {
        let bos = self.get("bos_token_id");
        Ok(SpecialTokens {
            bos: bos.map(|v| self.token("bos_token_id", v)).transpose()?,
            eos: match self.get("eos_token_id") {
                None => Vec::new(),
                Some(Value::Array(ids)) => {
                    let ids = ids.iter().map(|v| self.token("eos_token_id", v));
                    ids.collect::<Result<_, _>>()?
                }
                Some(id) => vec![self.token("eos_token_id", id)?],
            },
        })
    }
}
