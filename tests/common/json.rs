//! Looking into `--json` output without fixing more of its form than the tests mean.

use serde_json::Value;

use super::Done;

/// The output of a command as JSON; it must carry a version.
#[track_caller]
pub fn parsed(done: Done) -> Value {
    let told = done.told();
    let value: Value = serde_json::from_str(&done.ok()).unwrap_or_else(|e| panic!("{e}: {told}"));
    let version = value.pointer("/output_version/major");
    assert!(version.is_some_and(Value::is_number), "no version: {told}");
    value
}

/// Every value of `key` anywhere in `value`, in order.
pub fn all<'a>(value: &'a Value, key: &str) -> Vec<&'a Value> {
    let mut found = Vec::new();
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                if name == key {
                    found.push(field);
                }
                found.extend(all(field, key));
            }
        }
        Value::Array(items) => items.iter().for_each(|item| found.extend(all(item, key))),
        _ => {}
    }
    found
}

/// The text values of `key` anywhere in `value`.
pub fn texts(value: &Value, key: &str) -> Vec<String> {
    all(value, key).into_iter().filter_map(Value::as_str).map(str::to_owned).collect()
}
