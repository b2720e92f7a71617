//! Times as the tables hold them: see [`super`].

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, Value, ValueRef};

use crate::types::Timestamp;

/// A time as the tables hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::catalog) struct Time(pub Timestamp);

impl Time {
    /// A time that is NULL where it equals `mtime`: three equal times are the rule for new files.
    pub fn unless(time: Timestamp, mtime: Timestamp) -> Option<Time> {
        (time != mtime).then_some(Time(time))
    }
}

impl ToSql for Time {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        let nanos = self.0.as_nanos();
        if Timestamp::from_nanos(nanos) == self.0 {
            return Ok(nanos.into());
        }
        let mut bytes = self.0.secs.to_be_bytes().to_vec();
        bytes.extend(self.0.nanos.to_be_bytes());
        Ok(ToSqlOutput::Owned(Value::Blob(bytes)))
    }
}

impl FromSql for Time {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Time> {
        match value {
            ValueRef::Integer(nanos) => Ok(Time(Timestamp::from_nanos(nanos))),
            ValueRef::Blob(bytes) => {
                let (secs, nanos) = bytes.split_at_checked(8).ok_or(FromSqlError::InvalidType)?;
                let secs = secs.try_into().map_err(|_| FromSqlError::InvalidType)?;
                let nanos = nanos.try_into().map_err(|_| FromSqlError::InvalidType)?;
                let nanos = u32::from_be_bytes(nanos);
                if nanos >= 1_000_000_000 {
                    return Err(FromSqlError::OutOfRange(i64::from(nanos)));
                }
                Ok(Time(Timestamp { secs: i64::from_be_bytes(secs), nanos }))
            }
            _ => Err(FromSqlError::InvalidType),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::{Connection, params};

    #[test]
    fn times_beyond_what_nanoseconds_hold_come_back_exactly() {
        let db = Connection::open_in_memory().unwrap();
        for (secs, nanos) in [(0, 0), (-1, 999_999_999), (i64::MAX, 1), (i64::MIN, 0), (1 << 40, 7)]
        {
            let time = Time(Timestamp { secs, nanos });
            let back: Time = db.query_row("SELECT ?1", params![time], |row| row.get(0)).unwrap();
            assert_eq!(back, time);
        }
    }
}
