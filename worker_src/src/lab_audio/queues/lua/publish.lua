-- PUBLISH: tell Redis of a ready batch, in one act.
-- KEYS: processing list of the unpack job, batch total, processed, s3_key, the host's transcribe list, then the
--       lists where its jobs may be in flight.  ARGV: unpack job, total, processed, s3_key, then the pending jobs.
redis.call('SET', KEYS[2], ARGV[2])
if tonumber(redis.call('GET', KEYS[3]) or '-1') < tonumber(ARGV[3]) then
    redis.call('SET', KEYS[3], ARGV[3])
end
redis.call('SET', KEYS[4], ARGV[4])
local there = {}
for list = 5, #KEYS do
    for _, job in ipairs(redis.call('LRANGE', KEYS[list], 0, -1)) do
        there[job] = true
    end
end
for place = 5, #ARGV do
    if not there[ARGV[place]] then
        redis.call('RPUSH', KEYS[5], ARGV[place])
    end
end
return redis.call('LREM', KEYS[1], 0, ARGV[1])
