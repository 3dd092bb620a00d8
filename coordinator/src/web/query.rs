//! The part of an address behind `?`, read strictly: what is not known is refused by name.

use std::str::FromStr;

use axum::extract::RawQuery;
use cohort_common::home::RunName;

use super::error::Failure;

/// Keys and values, in order.
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Reads a query in which only `known` keys may stand.
    pub fn read(RawQuery(query): RawQuery, known: &[&str]) -> Result<Self, Failure> {
        let query = query.unwrap_or_default();
        let pairs: Vec<(String, String)> = form_urlencoded::parse(query.as_bytes())
            .into_owned()
            .collect();
        match pairs.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            None => Ok(Self(pairs)),
            Some((key, _)) => Err(Failure::invalid(format!(
                "`{key}` is not known here; what can be asked for is {}",
                match known.is_empty() {
                    true => "nothing".to_owned(),
                    false => known.join(", "),
                }
            ))),
        }
    }

    /// All values of a key.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        let of_key = move |(name, _): &&(String, String)| name == key;
        self.0
            .iter()
            .filter(of_key)
            .map(|(_, value)| value.as_str())
    }

    /// The number that a key has; `None` where it is absent or empty.
    pub fn number<T: FromStr>(&self, key: &str) -> Result<Option<T>, Failure> {
        let mut values = self.all(key);
        let value = values.next().filter(|value| !value.is_empty());
        if values.next().is_some() {
            return Err(Failure::invalid(format!(
                "`{key}` stands there twice; once will do"
            )));
        }
        let parse = |value: &str| {
            value.parse().map_err(|_| {
                Failure::invalid(format!(
                    "`{key}` is `{value}`, but it must be a whole number"
                ))
            })
        };
        value.map(parse).transpose()
    }
}

/// A run's name as it stands in an address.
pub fn run_name(name: &str) -> Result<RunName, Failure> {
    RunName::new(name).map_err(|error| Failure::invalid(error.to_string()))
}
