-- ACK: a job is settled. KEYS: its processing list, batch total, processed.  ARGV: job, settled items by the ledger.
-- Returns 1 if the batch has reached its total.
redis.call('LREM', KEYS[1], 0, ARGV[1])
local total = tonumber(redis.call('GET', KEYS[2]) or '-1')
if total < 0 then
    return 0
end
local processed = math.max(tonumber(redis.call('GET', KEYS[3]) or '0'), tonumber(ARGV[2]))
redis.call('SET', KEYS[3], processed)
return processed >= total and 1 or 0
