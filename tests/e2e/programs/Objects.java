// Objects in a growing hash map, arrays, garbage; prints one sum. Argument: thousands of entries.
import java.util.ArrayList;
import java.util.HashMap;
import java.util.TreeMap;

public class Objects {
    public static void main(String[] arguments) {
        int count = Integer.parseInt(arguments[0]) * 1000;
        HashMap<Integer, String> map = new HashMap<>();
        ArrayList<long[]> arrays = new ArrayList<>();
        for (int i = 0; i < count; i++) {
            map.put((int) ((long) i * 7919 % 1000003), "value " + i);
            if (i % 4 == 0)
                arrays.add(new long[] {i, i * 3L, i * 7L, i * 11L, i * 13L, i * 17L});
        }
        for (int i = 0; i < count; i += 3)
            map.merge((int) ((long) i * 7919 % 1000003), "!", String::concat);
        long sum = 0;
        for (var entry : new TreeMap<>(map).entrySet())
            sum = sum * 31 + entry.getKey() + entry.getValue().hashCode();
        for (long[] array : arrays)
            for (long value : array)
                sum = sum * 31 + value;
        System.out.println(map.size() + " " + sum);
    }
}
