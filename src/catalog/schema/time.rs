//! Times as the tables hold them: see [`super`].

use rusqlite::Row;
use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, Value, ValueRef};

use crate::types::Timestamp;

/// A time as the tables hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::catalog) struct Time(pub Timestamp);

impl Time {
    /// A time beside `mtime`, NULL where they are equal: three equal times are the rule for new
    /// files.
    pub fn beside(time: Timestamp, mtime: Timestamp) -> Option<Beside> {
        (time != mtime).then_some(Beside { time, mtime })
    }

    /// The inverse of [`Time::beside`].
    pub fn read_beside(
        row: &Row<'_>,
        column: usize,
        mtime: Timestamp,
    ) -> rusqlite::Result<Timestamp> {
        match row.get_ref(column)? {
            ValueRef::Null => Ok(mtime),
            ValueRef::Blob(bytes) if (1..=BESIDE_BYTES_MAX).contains(&bytes.len()) => {
                let mut nanos = [if bytes[bytes.len() - 1] < 0x80 { 0 } else { 0xff }; 8];
                nanos[..bytes.len()].copy_from_slice(bytes);
                let nanos = mtime.as_nanos().checked_add(i64::from_le_bytes(nanos));
                nanos.map(Timestamp::from_nanos).ok_or_else(|| {
                    rusqlite::Error::IntegralValueOutOfRange(column, mtime.as_nanos())
                })
            }
            _ => Ok(row.get::<_, Time>(column)?.0),
        }
    }
}

/// The most bytes of a difference; a greater one saves nothing.
const BESIDE_BYTES_MAX: usize = 7;

/// A time as the tables hold it beside another that is known.
#[derive(Clone, Copy, Debug)]
pub(in crate::catalog) struct Beside {
    time: Timestamp,
    mtime: Timestamp,
}

impl Beside {
    /// How far it is, if both are exact to the nanosecond and not far from each other.
    fn difference(&self) -> Option<Vec<u8>> {
        let nanos = exact(self.time)?.checked_sub(exact(self.mtime)?)?;
        let bytes = nanos.to_le_bytes();
        // What the last byte's first bit says need not be written.
        let length = (1..=BESIDE_BYTES_MAX).find(|length| {
            let unused = 64 - 8 * length;
            nanos << unused >> unused == nanos
        })?;
        Some(bytes[..length].to_vec())
    }
}

impl ToSql for Beside {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self.difference() {
            Some(bytes) => ToSqlOutput::Owned(Value::Blob(bytes)),
            None => whole(self.time),
        })
    }
}

impl ToSql for Time {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(whole(self.0))
    }
}

/// Nanoseconds, where they say all of it.
fn exact(time: Timestamp) -> Option<i64> {
    let nanos = time.as_nanos();
    (Timestamp::from_nanos(nanos) == time).then_some(nanos)
}

fn whole(time: Timestamp) -> ToSqlOutput<'static> {
    if let Some(nanos) = exact(time) {
        return nanos.into();
    }
    let mut bytes = time.secs.to_be_bytes().to_vec();
    bytes.extend(time.nanos.to_be_bytes());
    ToSqlOutput::Owned(Value::Blob(bytes))
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

    #[test]
    fn a_time_beside_another_comes_back_and_is_short_where_they_are_near() {
        let db = Connection::open_in_memory().unwrap();
        let now = 1_764_000_000_123_456_789;
        let times = [now, now + 1, now - 1, now + 127, now + 128, now - 128, now - 129]
            .into_iter()
            .chain([now + (1 << 55) - 1, now + (1 << 55), now - (1 << 55), 0, -7, i64::MAX])
            .map(Timestamp::from_nanos)
            .chain([
                Timestamp { secs: i64::MAX, nanos: 1 },
                Timestamp { secs: i64::MIN, nanos: 0 },
            ]);
        let times: Vec<Timestamp> = times.collect();
        for mtime in &times {
            for time in &times {
                let back = db.query_row("SELECT ?1", params![Time::beside(*time, *mtime)], |row| {
                    Time::read_beside(row, 0, *mtime)
                });
                assert_eq!(back.unwrap(), *time, "beside {mtime:?}");
                // So all of them were written once.
                let whole = db.query_row("SELECT ?1", params![Time(*time)], |row| {
                    Time::read_beside(row, 0, *mtime)
                });
                assert_eq!(whole.unwrap(), *time);
            }
        }
        let near = Time::beside(times[3], times[0]);
        let length = db.query_row("SELECT length(?1)", params![near], |row| row.get::<_, i64>(0));
        assert_eq!(length.unwrap(), 1);
        let empty = db.query_row("SELECT x''", [], |row| Time::read_beside(row, 0, times[0]));
        assert!(empty.is_err());
    }
}
